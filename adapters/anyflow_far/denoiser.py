"""An AnyFlow-FAR transformer over kvpack's memory: a chunk alone in every forward, all guidance branches in it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from kvpack.adapters.anyflow_far.attention import attached, clean_times_for
from kvpack.adapters.wan.denoiser import WanMemory
from kvpack.adapters.wan.vae import onload
from kvpack.memory.layer import AttendingLayer
from kvpack.memory.ledger import Piece


class AnyFlowFARMemory(WanMemory):
    """Memory of one generation: one session, whose rows are those of the guidance branches, the negative one first."""

    #: Whether denoising attends keys of zeros where upstream does.
    upstream_padding = False
    #: Denoising forwards of the chunk so far.
    _steps = 0

    @property
    def branches(self) -> tuple[str, ...]:
        """The one session of all branches, by their names in the order of its rows."""
        return ("+".join(reversed(self.embeds)),)

    def begin_chunk(self) -> None:
        """The coming forward is a chunk's first denoising step."""
        self._steps = 0

    def forward(self, branch: str, latents: Tensor, timesteps: Tensor, step: int | None = None) -> Tensor:
        """The transformer's output for latents of all branches, at a denoising step."""
        self._steps = step or 0
        frames = latents.shape[2]
        times = timesteps[:, None].expand(-1, frames)
        output, _ = self.transformer(
            hidden_states=latents.transpose(1, 2),
            timestep=times,
            r_timestep=times,
            encoder_hidden_states=self._text(),
            chunk_partition=[frames],
            attention_kwargs=self.attention_kwargs,
            return_dict=False,
        )
        return output.transpose(1, 2)

    def _attached(self) -> AbstractContextManager[None]:
        return attached(self.transformer, self._next_forward, self.prompt)

    def _next_forward(self) -> tuple[Sequence[AttendingLayer], bool]:
        """Memory of each layer for the coming forward; the pipeline tells no step, so that they are counted."""
        padded = self.upstream_padding and self.denoising
        layers = self._layers_for(self.branches[0], self._steps)
        self._steps += 1
        return layers, padded

    def _text(self) -> Tensor:
        texts = [self.embeds[name] for name in reversed(self.embeds)]
        return texts[0] if len(texts) == 1 else torch.cat(texts)  # the same tensor again, by which it is known

    def _all_rows(self, rows: Tensor) -> Tensor:
        """Rows of the videos, once for each guidance branch."""
        return torch.cat([rows] * len(self.embeds))

    def _vetoed(self, latents: Tensor) -> Tensor | None:
        vetoed = super()._vetoed(self._all_rows(latents))
        return None if vetoed is None else vetoed.chunk(len(self.embeds))[-1]

    def _commit(self, latents: Tensor, twins: Mapping[Piece, Tensor], *, again: bool = False) -> None:
        every = {piece: self._all_rows(tokens) for piece, tokens in twins.items()}
        super()._commit(self._all_rows(latents), every, again=again)

    @contextmanager
    def _riding(self, latents: Tensor, twins: Mapping[Piece, Tensor]) -> Iterator[None]:
        tokens = sum(each.shape[1] for each in twins.values())
        times = clean_times_for(self.transformer, tokens) if twins else nullcontext()
        with super()._riding(latents, twins), times:
            yield

    def _modulation(self, branch: str, times: Tensor) -> Tensor:
        one = {"num_full_frames": 1, "full_token_per_frame": 1, "compressed_token_per_frame": 1}
        embedder, times = self.transformer.condition_embedder, times[:, None]
        _, modulation, *_ = embedder(times, times, self._text(), far_cfg=one)
        return modulation[:, 0].unflatten(1, (6, -1))

    def _native(self) -> Callable[[Tensor], Tensor]:
        def embed(latents: Tensor) -> Tensor:
            onload(self.transformer)
            latents = latents.to(self.transformer.dtype)
            return self.transformer.far_patch_embedding(latents).flatten(2).transpose(1, 2)

        return embed
