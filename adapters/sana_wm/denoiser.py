"""The SANA-WM refiner's transformer over kvpack's memory."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from torch import Tensor

from kvpack.adapters.attention import attached
from kvpack.adapters.sana_wm.attention import PackedSanaWMAttnProcessor
from kvpack.generation.denoiser import Denoiser
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry

BRANCH = "cond"


@dataclass(frozen=True, eq=False)
class Text:
    """What the transformer is told of a prompt; its length is the batch.

    Args:
        embeds: text embeddings `[batch, tokens, width]`.
        mask: 1 where a token counts, `[batch, tokens]`.
    """

    embeds: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.embeds)


class SanaWMDenoiser(Denoiser):
    """The refiner's transformer over its one session.

    Args:
        pipeline: a `SanaWMLTX2Refiner`.
        stack: the memory policy.
        geometry: of its transformer.
        conditioning: a `Text` of the one branch.
        fps: pixel frames a second.
    """

    def __init__(
        self, pipeline: Any, stack: Memory, geometry: Geometry, conditioning: dict[str, Any], fps: float
    ) -> None:
        super().__init__(pipeline, stack, geometry, conditioning)
        self.fps = fps

    def seam(self) -> AbstractContextManager[None]:
        """Put kvpack's processors into the transformer for the block."""
        attentions = [block.attn1 for block in self.transformer.transformer_blocks]
        return attached(self.transformer, attentions, lambda *_: self.layers_for(BRANCH), PackedSanaWMAttnProcessor)

    def forward_clean(self, branch: str, latents: Tensor) -> None:
        """Run the pipeline's own forward of clean frames, whose cache stays empty."""
        text, first = self.conditioning[branch], self.frames
        self.pipeline._capture_block_kv(
            clean_block=latents,
            # For upstream's rotations, which are not used.
            frame_positions=list(range(first, first + latents.shape[2])),
            prompt_embeds=text.embeds,
            prompt_attention_mask=text.mask,
            fps=self.fps,
            # The forward asks for one; nobody fills it.
            kv_cache=SanaWMRefinerKVCache(len(self.transformer.transformer_blocks)),
            # As upstream: the sink comes first. kvpack's processors do not look at it.
            kv_cache_mode="inject_and_capture_post_rope" if first else "capture_pre_rope",
            device=latents.device,
        )
