"""AnyFlow-FAR (`AnyFlowFARPipeline`, arXiv 2605.13724): causal Wan 2.1, text-, image- and video-to-video."""

from collections.abc import Mapping
from typing import Any

from diffusers import AnyFlowFARPipeline

from kvpack.adapters.anyflow_far.chunks import Chunks
from kvpack.adapters.anyflow_far.run import AnyFlowFARRun
from kvpack.adapters.wan.adapter import WanAdapter
from kvpack.adapters.wan.compression import native_window
from kvpack.plugins.registry import registry


class AnyFlowFARAdapter(WanAdapter):
    """Drives `AnyFlowFARPipeline` chunk by chunk; only a new chunk is encoded, where upstream encodes all of history.

    Further argument of the pipeline's call: `upstream_padding`, False. On its reads upstream pads to a multiple of 128
    tokens without a mask, so that keys of zeros are attended; True does so too, for a comparison with it.
    """

    name = "anyflow-far"
    shards = False
    pipelines = (AnyFlowFARPipeline,)  # the bidirectional `AnyFlowPipeline` has no history
    run_class = AnyFlowFARRun
    extra_arguments = {"upstream_padding": False}
    trainee_class = None  # its forwards have two times, which training does not know yet
    takes_writer = False

    def default_options(self, configs: Mapping[str, Mapping[str, Any]], stack: str) -> dict[str, Any]:
        """Return chunks as the model was trained; `packforcing` in its sizes, with its own embedding as the compressor.

        As many chunks are recent as the model holds whole, and at most as many compressed ones are attended as it has
        seen. A block that is compressed 4x only is large, so that the archive is bounded.
        """
        config = configs["transformer"]
        chunks, whole = Chunks.of(config["chunk_partition"]), config["full_chunk_limit"]
        if stack != "packforcing":
            return {"chunk_frames": chunks.rest}
        return {
            "chunk_frames": chunks.rest,
            "sink_frames": chunks.first + chunks.rest,
            "recent_frames": max(1, whole - 1) * chunks.rest,  # full_chunk_limit counts the current chunk too
            "topk": max(1, len(config["chunk_partition"]) - whole),  # those of the last chunk in training
            "archive_blocks": 32,
            "train_frames": sum(config["chunk_partition"]),
            **_native(native_window(config)),
        }


def _native(window: tuple[int, int] | None) -> dict[str, Any]:
    """Return the compressor that is the model's own embedding, if it has one, of square patches."""
    if window is None or window[0] != window[1]:
        return {}
    return {"compressor": registry().policy("compressor", "native", {"window": window[0]})}
