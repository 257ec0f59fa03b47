"""A Wan transformer over kvpack's memory: each forward's phase told, each chunk committed. Who samples is not said."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext
from torch import Tensor

from kvpack.adapters.wan.attention import attached
from kvpack.adapters.wan.compression import check_compressor, hidden_tokens, latent_chunk
from kvpack.adapters.wan.project import project_tokens
from kvpack.adapters.wan.prompt_cache import PromptCache
from kvpack.adapters.wan.vae import encode, forward_tokens, riding
from kvpack.errors import GradientError
from kvpack.generation.replay import CleanFrames
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry
from kvpack.memory.layer import AttendingLayer, LayerCache
from kvpack.memory.ledger import Piece
from kvpack.memory.session import Session, finish_commits


class WanMemory:
    """Memory of one generation by every guidance branch.

    Args:
        pipeline: a `WanPipeline`.
        stack: the memory policy.
        geometry: of its transformer.
        embeds: text embeddings of each guidance branch.
        attention_kwargs: passed on to the transformer.
        buffer: what a layer attends; another one lets gradients through.

    Raises:
        InvalidOptionError: if the compressor cannot work with this model.
    """

    def __init__(
        self,
        pipeline: Any,
        stack: Memory,
        geometry: Geometry,
        embeds: dict[str, Tensor],
        attention_kwargs: Mapping[str, Any] | None = None,
        buffer: type[LayerCache] = LayerCache,
    ) -> None:
        check_compressor(pipeline.transformer, stack)
        self.pipeline, self.stack, self.geometry, self.embeds = pipeline, stack, geometry, embeds
        self.transformer, self.attention_kwargs, self.buffer = pipeline.transformer, attention_kwargs, buffer
        self.sessions: dict[str, Session] = {}
        self.seconds = {"denoise": 0.0, "commit": 0.0, "compress": 0.0, "decode": 0.0}
        self.compressor = stack.latent_compressor
        self._clean = CleanFrames(0 if buffer.differentiable else stack.replay_frames)
        #: Keys and values of the prompt; None where somebody else's code runs between two forwards.
        self.prompt: PromptCache | None = None
        #: Tells a branch's session what the coming forward is.
        self._announce: Callable[[Session, int], Any] = _denoise

    @property
    def frames(self) -> int:
        """Committed latent frames."""
        return next(iter(self.sessions.values())).frames if self.sessions else 0

    @property
    def branches(self) -> tuple[str, ...]:
        """Guidance branches that have a session of their own."""
        return tuple(self.embeds)

    def session(self, branch: str) -> Session:
        """Memory of one branch, new at its first mention."""
        if branch not in self.sessions:
            self.sessions[branch] = Session(self.stack, self.geometry, layer=self.buffer)
        return self.sessions[branch]

    def expect(self, frames: int) -> None:
        """Announces the length of the coming chunk to every branch."""
        for branch in self.branches:
            session = self.session(branch)
            if session.coming_frames != frames:
                session.expect(frames)

    def attached(self) -> AbstractContextManager[None]:
        """Kvpack's processors in the transformer, whose forwards are denoising steps unless `commit` makes them."""
        self._announce = _denoise
        return self._attached()

    def _attached(self) -> AbstractContextManager[None]:
        return attached(self.transformer, self._memory_for, self.prompt)

    @property
    def denoising(self) -> bool:
        """Whether forwards are denoising steps."""
        return self._announce is _denoise

    def check_policies(self) -> None:
        """Raises `PolicyError` if a policy broke its contract in the chunk in progress."""
        for session in self.sessions.values():
            session.check_policies()

    def accepted(self, make: Callable[[int], Tensor]) -> Tensor:
        """Clean latents of a chunk that the memory accepts; rows that it vetoes are made again.

        Args:
            make: denoises the chunk; told how often it has been before.
        """
        latents = make(0)
        for retry in range(self.stack.max_retries):
            vetoed = self._vetoed(latents)
            if vetoed is None:
                return latents
            again = make(retry + 1)
            latents = torch.where(vetoed[:, None, None, None, None].to(latents.device), again, latents)
        for session in self.sessions.values():
            session.settle()
        return latents

    def _vetoed(self, latents: Tensor) -> Tensor | None:
        """Rows of the chunk that the memory wants made anew; None if it accepts them."""
        vetoes = [session.review(latents) for session in self.sessions.values()]
        return next((each for each in vetoes if each is not None), None)

    def forward(self, branch: str, latents: Tensor, timesteps: Tensor, step: int | None = None) -> Tensor:
        """The transformer's output for latents of one branch, at a denoising step."""
        with self.transformer.cache_context(branch, step_index=step):
            (output,) = self.transformer(
                hidden_states=latents,
                timestep=timesteps,
                encoder_hidden_states=self.embeds[branch],
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
            )
        return output

    def commit(self, latents: Tensor, pixels: Tensor | None, *, given: bool = False) -> None:
        """The clean chunk at t = 0 through every branch that has to: the only write to history.

        Args:
            latents: the chunk's clean latents.
            pixels: the same decoded, if the stack needs them.
            given: whether they come from outside, so that no denoising forward has seen them.
        """
        twins: dict[Piece, Tensor] = {}
        with self.timed("compress"):
            for piece in next(iter(self.sessions.values())).twins_due():
                twins[piece] = self._hidden_tokens(piece, latents, pixels)
        clean = self._clean.with_chunk(latents, twins, pixels if self.stack.reencodes else None)
        with self._whole():
            if self.stack.replays_always:
                self._replay(clean, latents.shape[2])
            else:
                self._commit(latents, twins, again=given)
        self._clean = clean

    def turn(self, embeds: dict[str, Tensor], *, cut: bool = False) -> None:
        """Goes on under another prompt: the memory is told, and what of it is to be computed anew is.

        Args:
            embeds: text embeddings of each guidance branch.
            cut: whether a new scene begins.
        """
        with self._whole():
            self.embeds = embeds
            for session in self.sessions.values():
                session.tell("prompt-changed")
                if cut:
                    session.tell("scene-cut")
            if self.sessions:
                self._replay(self._clean)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """All of it is done or nothing."""
        embeds = self.embeds
        pasts: list[tuple[Any, Any]] = [(session, session.past) for session in self.sessions.values()]
        try:
            yield
        except BaseException:
            self.embeds = embeds
            for session, past in pasts:
                session.adopt(past)
            raise

    def _replay(self, clean: "CleanFrames", coming: int = 0) -> None:
        """Commits the last frames again; the last of them for the first time, if a chunk is coming."""
        plan = next(iter(self.sessions.values())).replays(coming)
        if not plan:
            return
        latents = clean.last(sum(plan))
        if self.stack.reencodes and sum(plan) < self.frames + coming:
            with self.timed("compress"), torch.no_grad():
                first = encode(self.pipeline.vae, clean.last_pixels(sum(plan))[:, :, :1])
            latents = torch.cat([first.to(latents), latents[:, :, 1:]], dim=2)
        for session in self.sessions.values():
            session.rewind(sum(plan) - coming)
        for part in latents.split(plan, dim=2):
            session = next(iter(self.sessions.values()))
            self._commit(part, {piece: clean.twins[piece] for piece in session.twins_due()}, again=True)

    def _commit(self, latents: Tensor, twins: Mapping[Piece, Tensor], *, again: bool = False) -> None:
        """The forwards of a clean chunk and of its twins, and the write."""
        last = max(session.step for session in self.sessions.values())
        try:
            for branch, session in self.sessions.items():
                # A branch that guidance left out of the last step has nothing of it to keep.
                rerun = again or self.stack.commit == "rerun" or session.step < last
                rides = bool(twins) and rerun and self._ride
                if rerun:
                    # What a chunk leaves behind whole has no gradient: a graph spans one chunk, and the twins in it.
                    with self.timed("commit"), torch.no_grad(), self._riding(latents, twins if rides else {}):
                        self._clean_forward(branch, latents.to(self.transformer.dtype))
                if not rides:
                    with self.timed("compress"):
                        for piece, tokens in twins.items():
                            self._make_twin(branch, session, piece, tokens)
        finally:
            self._announce = _denoise
        finish_commits(list(self.sessions.values()))

    @property
    def _ride(self) -> bool:
        """Whether twins' tokens go through the layers together with their chunk, which costs next to nothing."""
        return self.compressor is not None and self.compressor.project == "layers" and not self.buffer.differentiable

    @contextmanager
    def _riding(self, latents: Tensor, twins: Mapping[Piece, Tensor]) -> Iterator[None]:
        """Forwards are commits of clean latents, with twins' tokens in them."""
        self._announce = lambda session, _: session.commit(tuple(twins), latents)
        with riding(self.transformer, torch.cat(list(twins.values()), dim=1)) if twins else nullcontext():
            yield

    def _make_twin(self, branch: str, session: Session, piece: Piece, tokens: Tensor) -> None:
        """Keys and values of a piece's hidden tokens, for `finish_commits`."""
        assert self.compressor is not None
        if self.compressor.project == "layers":
            self._announce = lambda session, _: session.compress(piece)
            forward_tokens(self.transformer, tokens, lambda dummy: self._clean_forward(branch, dummy))
            return
        assert isinstance(session, Session)  # no other makes twins
        session.compress(piece)
        modulation = partial(self._modulation, branch, self._clean_times(tokens))
        projected = project_tokens(self.transformer, tokens, modulation, attention_kwargs=self.attention_kwargs)
        for layer, (keys, values) in zip(session.layers, projected, strict=True):
            layer.hear(keys, values)

    def _modulation(self, branch: str, times: Tensor) -> Tensor:
        """Shifts and scales of a layer's input at these times, `[batch, 6, width]`."""
        _, modulation, *_ = self.transformer.condition_embedder(times, self.embeds[branch])
        return modulation.unflatten(1, (6, -1))

    def _clean_forward(self, branch: str, latents: Tensor) -> None:
        self.forward(branch, latents, self._clean_times(latents))

    def _clean_times(self, rows: Tensor) -> Tensor:
        """The timestep t = 0 of every row."""
        return torch.zeros(rows.shape[0], dtype=self.pipeline.scheduler.timesteps.dtype, device=rows.device)

    def _hidden_tokens(self, piece: Piece, latents: Tensor, pixels: Tensor | None) -> Tensor:
        """A latent-space compressor's tokens for a piece of the chunk."""
        assert self.compressor is not None
        seen = piece, self.frames, latents, pixels, self._native()
        chunk = latent_chunk(self.compressor, self.pipeline, self.geometry, *seen)
        return hidden_tokens(self.compressor, chunk, next(iter(self.sessions.values())).policy_seconds)

    def _native(self) -> Callable[[Tensor], Tensor] | None:
        """The model's own embedding for compressed latents, if it has one."""
        return None

    def _memory_for(self, context: CacheContext) -> Sequence[AttendingLayer]:
        return self._layers_for(context.name, context.step_index or 0)

    def _layers_for(self, branch: str, step: int) -> Sequence[AttendingLayer]:
        """Tells the branch's session what the coming forward is."""
        if torch.is_grad_enabled() and not self.buffer.differentiable:
            raise GradientError(
                "gradients are enabled inside generation, where recomputation would commit a chunk twice; "
                "remove torch.enable_grad() and torch.set_grad_enabled(True) from callbacks and wrappers"
            )
        session = self.session(branch)
        self._announce(session, step)
        return session.layers

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's seconds to those of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


def _denoise(session: Session, step: int) -> None:
    session.denoise(step)
