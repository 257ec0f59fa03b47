"""An AnyFlow-FAR transformer over kvpack's memory: a chunk alone in every forward, all guidance branches in it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowCrossAttnProcessor
from torch import Tensor

from kvpack.adapters.anyflow_far.attention import Padded, attached, clean_times_for
from kvpack.adapters.offload import onload
from kvpack.adapters.wan.denoiser import WanDenoiser
from kvpack.memory.layer import AttendingLayer
from kvpack.memory.ledger import BlockEntry


class AnyFlowFARDenoiser(WanDenoiser):
    """One session, whose rows are those of the guidance branches, the negative one first.

    Args:
        upstream_padding: whether denoising attends keys of zeros where upstream does.
        args: those of `WanDenoiser`.
        kwargs: those of `WanDenoiser`.
    """

    cross_processor = AnyFlowCrossAttnProcessor

    def __init__(self, *args: Any, upstream_padding: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.upstream_padding = upstream_padding

    @property
    def branches(self) -> tuple[str, ...]:
        """The one session of all branches, by their names in the order of its rows."""
        return ("+".join(reversed(self.conditioning)),)  # upstream concatenates [negative, positive]

    def forward(self, branch: str, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return the transformer's output for latents of all branches."""
        frames = latents.shape[2]
        # Of frames: the model's own forward repeats them for tokens.
        times = timesteps[:, None].expand(-1, frames)
        output, _ = self.transformer(
            hidden_states=latents.transpose(1, 2),  # (b, frames, channels, height, width)
            timestep=times,
            r_timestep=times,  # to the same time, as a clean chunk goes nowhere
            encoder_hidden_states=self._text(),
            chunk_partition=[frames],
            attention_kwargs=self.attention_kwargs,
            return_dict=False,
        )
        return output.transpose(1, 2)  # [batch, channels, frames, height, width]

    def seam(self) -> AbstractContextManager[None]:
        """Put kvpack's processors into the transformer for the block."""
        return attached(self.transformer, self._next_layers, self._prompted())

    def _next_layers(self) -> Sequence[AttendingLayer]:
        layers = self.layers_for(self.branches[0])
        padded = self.upstream_padding and self.phase is not None and self.phase.kind == "denoise"
        return [Padded(layer) for layer in layers] if padded else layers

    def _text(self) -> Tensor:
        texts = [self.conditioning[name] for name in reversed(self.conditioning)]
        return texts[0] if len(texts) == 1 else torch.cat(texts)  # the same tensor again, by which it is known

    def _all_rows(self, rows: Tensor) -> Tensor:
        """Return rows of the videos, once for each guidance branch."""
        return torch.cat([rows] * len(self.conditioning))

    def vetoed(self, latents: Tensor) -> Tensor | None:
        """Return the rows that the memory vetoes; branches of a video go together."""
        vetoed = super().vetoed(self._all_rows(latents))
        # Of the last branch: all have seen the same latents.
        return None if vetoed is None else vetoed.chunk(len(self.conditioning))[-1]

    def commit_branch(self, branch: str, latents: Tensor, tokens: Mapping[BlockEntry, Tensor], *, rerun: bool) -> None:
        """Run the forwards of a clean chunk in the rows of all branches."""
        every = {piece: self._all_rows(each) for piece, each in tokens.items()}
        super().commit_branch(branch, self._all_rows(latents), every, rerun=rerun)

    @contextmanager
    def _appended(self, tokens: list[Tensor]) -> Iterator[None]:
        count = sum(each.shape[1] for each in tokens)
        with super()._appended(tokens), clean_times_for(self.transformer, count) if count else nullcontext():
            yield

    def modulation(self, branch: str, times: Tensor) -> Tensor:
        """Return shifts and scales of a layer's input at these times, `[batch, 6, width]`."""
        one = {"num_full_frames": 1, "full_token_per_frame": 1, "compressed_token_per_frame": 1}
        embedder, times = self.transformer.condition_embedder, times[:, None]
        _, modulation, *_ = embedder(times, times, self._text(), far_cfg=one)
        return modulation[:, 0].unflatten(1, (6, -1))  # (b, 6, width)

    def native_embedding(self) -> Callable[[Tensor], Tensor]:
        """Return the model's own embedding for compressed latents."""

        def embed(latents: Tensor) -> Tensor:
            onload(self.transformer)
            latents = latents.to(self.transformer.dtype)
            return self.transformer.far_patch_embedding(latents).flatten(2).transpose(1, 2)  # (b, l, width)

        return embed
