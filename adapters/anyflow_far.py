"""AnyFlow-FAR (`AnyFlowFARPipeline`, arXiv 2605.13724): causal Wan 2.1, text-, image- and video-to-video."""

from collections.abc import Mapping
from typing import Any

from diffusers import AnyFlowFARPipeline

from kvpack.adapters.anyflow_far_chunks import Chunks
from kvpack.adapters.anyflow_far_run import AnyFlowFARRun
from kvpack.adapters.wan import WanAdapter
from kvpack.adapters.wan_compressor import native_window
from kvpack.adapters.wan_trainee import WanTrainee
from kvpack.costs import ModelCost
from kvpack.errors import UnsupportedPipelineError
from kvpack.memory import Memory


class AnyFlowFARAdapter(WanAdapter):
    """Drives `AnyFlowFARPipeline` chunk by chunk; only a new chunk is encoded, where upstream encodes all of history.

    Further argument of the pipeline's call: `upstream_padding`, False. On its reads upstream pads to a multiple of 128
    tokens without a mask, so that keys of zeros are attended; True does so too, for a comparison with it.
    """

    name = "anyflow-far"
    extra_arguments = {"upstream_padding": False}

    def supports(self, pipeline: Any) -> bool:
        """Any `AnyFlowFARPipeline`; the bidirectional `AnyFlowPipeline` has no history."""
        return isinstance(pipeline, AnyFlowFARPipeline)

    def default_options(self, configs: Mapping[str, Mapping[str, Any]], stack: str) -> dict[str, Any]:
        """Chunks as the model was trained; `packforcing` holds whole what the model does, and compresses as it does."""
        config = configs["transformer"]
        chunks = Chunks.of(config["chunk_partition"])
        if stack != "packforcing":
            return {"chunk_frames": chunks.rest}
        return {
            "chunk_frames": chunks.rest,
            "sink_frames": chunks.first + 2 * chunks.rest,
            "recent_frames": max(1, config["full_chunk_limit"] - 1) * chunks.rest,
            "train_frames": sum(config["chunk_partition"]),
            **({} if native_window(config) is None else {"compressor": "native"}),
        }

    def model_cost(self, configs: Mapping[str, Mapping[str, Any]], height: int, width: int) -> ModelCost | None:
        """Nobody has counted it."""
        return None

    def run(self, pipeline: Any, stack: Memory, arguments: dict[str, Any], *, streaming: bool) -> AnyFlowFARRun:
        """Starts a generation; bad arguments are refused before anything is computed."""
        self.check(pipeline)
        return AnyFlowFARRun(self, pipeline, stack, arguments, streaming=streaming)

    def trainee(self, pipeline: Any, max_sequence_length: int | None = None) -> WanTrainee:
        """Its forwards have two times, which training does not know yet."""
        raise UnsupportedPipelineError(f"the adapter {self.name} cannot train yet; it has no `trainee`")
