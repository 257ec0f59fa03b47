"""SkyReels-V2 diffusion forcing: text, an image or a clip to video."""

from diffusers import (
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
)

from kvpack.adapters.skyreels.run import SkyReelsRun
from kvpack.adapters.wan.adapter import WanAdapter


class SkyReelsV2Adapter(WanAdapter):
    """Drives the three diffusion-forcing pipelines block after block; their transformer is Wan's in all but its times.

    `causal_block_size` is the length of a chunk. `overlap_history` and `base_num_frames`, upstream's own way to long
    videos, are not needed: the memory takes their place.
    """

    name = "skyreels-v2"
    shards = False
    pipelines = (  # the other two of the family are bidirectional
        SkyReelsV2DiffusionForcingPipeline,
        SkyReelsV2DiffusionForcingImageToVideoPipeline,
        SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    )
    run_class = SkyReelsRun
    extra_arguments = {}
    trainee_class = None
    takes_writer = False
