"""SkyReels-V2 diffusion forcing."""
