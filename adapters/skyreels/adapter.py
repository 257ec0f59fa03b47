"""SkyReels-V2 diffusion forcing: text, an image or a clip to video."""

from collections.abc import Mapping
from typing import Any, NoReturn

from diffusers import (
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
)

from kvpack.adapters.skyreels.call import in_blocks
from kvpack.adapters.skyreels.run import SkyReelsRun
from kvpack.adapters.wan.adapter import WanAdapter
from kvpack.errors import UnsupportedPipelineError
from kvpack.memory.base import Memory

_PIPELINES = (
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
)


class SkyReelsV2Adapter(WanAdapter):
    """Drives the three diffusion-forcing pipelines block after block; their transformer is Wan's in all but its times.

    `causal_block_size` is the length of a chunk. `overlap_history` and `base_num_frames`, upstream's own way to long
    videos, are not needed: the memory takes their place.
    """

    name = "skyreels-v2"
    extra_arguments = {}

    def supports(self, pipeline: Any) -> bool:
        """The diffusion-forcing pipelines; the other two of the family are bidirectional."""
        return isinstance(pipeline, _PIPELINES)

    def run(self, pipeline: Any, stack: Memory, arguments: dict[str, Any], *, streaming: bool) -> SkyReelsRun:
        """Starts a generation; bad arguments are refused before anything is computed."""
        self.check(pipeline)
        return SkyReelsRun(self, pipeline, in_blocks(pipeline, stack, arguments), arguments, streaming=streaming)

    def model_cost(self, configs: Mapping[str, Mapping[str, Any]], height: int, width: int) -> NoReturn:
        """Only what is trained has a cost of training."""
        raise UnsupportedPipelineError(f"the adapter {self.name} cannot plan a training yet")

    def trainee(self, pipeline: Any, max_sequence_length: int | None = None) -> NoReturn:
        """Not yet."""
        raise UnsupportedPipelineError(f"the adapter {self.name} cannot train yet")
