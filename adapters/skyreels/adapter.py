"""SkyReels-V2 diffusion forcing: text, an image or a clip to video."""

from collections.abc import Mapping
from typing import Any, NoReturn

from diffusers import (
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
)

from kvpack.adapters.skyreels.run import SkyReelsRun
from kvpack.adapters.wan.adapter import WanAdapter
from kvpack.errors import UnsupportedPipelineError


class SkyReelsV2Adapter(WanAdapter):
    """Drives the three diffusion-forcing pipelines block after block; their transformer is Wan's in all but its times.

    `causal_block_size` is the length of a chunk. `overlap_history` and `base_num_frames`, upstream's own way to long
    videos, are not needed: the memory takes their place.
    """

    name = "skyreels-v2"
    pipelines = (  # the other two of the family are bidirectional
        SkyReelsV2DiffusionForcingPipeline,
        SkyReelsV2DiffusionForcingImageToVideoPipeline,
        SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    )
    run_class = SkyReelsRun
    extra_arguments = {}

    def model_cost(self, configs: Mapping[str, Mapping[str, Any]], height: int, width: int) -> NoReturn:
        """Refuse it: only what is trained has a cost of training."""
        raise UnsupportedPipelineError(f"the adapter {self.name} cannot plan a training yet")

    def trainee(self, pipeline: Any, max_sequence_length: int | None = None) -> NoReturn:
        """Refuse it: nobody has tried."""
        raise UnsupportedPipelineError(f"the adapter {self.name} cannot train yet")
