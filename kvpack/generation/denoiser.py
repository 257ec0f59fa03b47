"""The transformer of one generation over kvpack's memory, whoever samples: a pipeline's call, a block, or training."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kvpack.errors import BusyPipelineError, GradientError, NonFiniteLatentsError
from kvpack.generation.guidance import Guidance
from kvpack.generation.phase import Phase
from kvpack.generation.replay import CleanFrames
from kvpack.memory.accounting import stats_of_all
from kvpack.memory.base import Memory
from kvpack.memory.geometry import Geometry, ShardedGeometry
from kvpack.memory.layer import AttendingLayer, LayerCache
from kvpack.memory.ledger import BlockEntry
from kvpack.memory.session import Session, finish_commits
from kvpack.memory.shard import Shard


class Denoiser(ABC):
    """Sessions of all guidance branches of one generation.

    A family says where its transformer attends (`seam`) and how a clean chunk is forwarded (`forward_clean`).

    Args:
        pipeline: has the transformer.
        stack: the memory policy.
        geometry: of the transformer.
        conditioning: what the transformer is told of the prompt, by guidance branch.
        buffer: what a layer attends; another one lets gradients through.
    """

    def __init__(
        self,
        pipeline: Any,
        stack: Memory,
        geometry: Geometry,
        conditioning: dict[str, Any],
        buffer: type[LayerCache] = LayerCache,
    ) -> None:
        self.pipeline, self.transformer = pipeline, pipeline.transformer
        self.stack, self.geometry, self.conditioning, self.buffer = stack, geometry, conditioning, buffer
        self.sessions: dict[str, Session] = {}
        self.seconds = {"denoise": 0.0, "commit": 0.0, "compress": 0.0, "decode": 0.0}
        self.phase: Phase | None = None  # what the forwards in progress are; None outside of `during`
        self._clean = CleanFrames(0 if buffer.differentiable else stack.replay_frames)  # training replays nothing

    #: The process that holds some heads of every layer; None where one process holds all.
    shard: Shard | None = None
    #: The process that runs one guidance branch; None where one process runs all.
    guidance: Guidance | None = None

    @property
    def link(self) -> Shard | None:
        """What binds this process to the others of the generation."""
        return self.shard if self.guidance is None else self.guidance.link

    @abstractmethod
    def seam(self) -> AbstractContextManager[None]:
        """Let the transformer's layers attend what `layers_for` returns, in all forwards of the block."""

    @abstractmethod
    def forward_clean(self, branch: str, latents: Tensor) -> None:
        """Run the transformer over clean latents at t = 0, whose keys and values become history."""

    def forward(self, branch: str, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return the transformer's output for latents of one branch, for training."""
        raise NotImplementedError(f"{type(self).__name__} has no `forward`, which training needs")

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the normalised latents of pixel frames, for a stack that encodes anew (`Memory.reencodes`)."""
        raise NotImplementedError(f"{type(self).__name__} cannot encode pixels; refuse such stacks in check_stack")

    def compress(self, piece: BlockEntry, latents: Tensor, pixels: Tensor | None) -> Tensor:
        """Return the hidden tokens that a latent-space compressor makes of a piece of a clean chunk."""
        raise NotImplementedError(f"{type(self).__name__} cannot compress latents; refuse such stacks in check_stack")

    def writing(self) -> AbstractContextManager[None]:
        """Let the model that commits, if it is another one, stand in for the transformer in the block."""
        return nullcontext()

    def forget_prompt(self) -> None:  # noqa: B027  # a family may keep nothing
        """Compute anew what is kept of the prompt: somebody else's code has run, which may have changed weights."""

    @property
    def own_geometry(self) -> Geometry:
        """The geometry of the heads that this process holds."""
        return self.geometry if self.shard is None else ShardedGeometry.of(self.geometry, self.shard)

    @property
    def branches(self) -> tuple[str, ...]:
        """Guidance branches that have a session of their own in this process."""
        return tuple(self.conditioning) if self.guidance is None else (self.guidance.own,)

    @property
    def frames(self) -> int:
        """Committed latent frames."""
        return self._first.frames if self.sessions else 0

    @property
    def _first(self) -> Session:
        return next(iter(self.sessions.values()))

    @property
    def pending_compressions(self) -> tuple[BlockEntry, ...]:
        """Pieces of the coming chunk that a latent-space compressor must make tokens of, the same in every branch."""
        return self._first.pending_compressions()

    def session(self, branch: str) -> Session:
        """Return the memory of one branch, new at its first mention."""
        if branch not in self.sessions:
            self.sessions[branch] = Session(self.stack, self.own_geometry, layer=self.buffer)
        return self.sessions[branch]

    def expect(self, frames: int) -> None:
        """Announce the length of the coming chunk to every branch."""
        for branch in self.branches:
            session = self.session(branch)
            if session.coming_frames != frames:  # expect() ends the chunk in progress
                session.expect(frames)

    def forget_chunk(self) -> None:
        """Take back all that is known of the chunk in progress; what is committed stays as it is."""
        for session in self.sessions.values():
            session.adopt(session.past)

    @contextmanager
    def during(self, phase: Phase | None) -> Iterator[None]:
        """Say what the forwards of the block are; None refuses them."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's seconds to those of a part of the work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start  # a block that raises counts too

    def layers_for(self, branch: str, step: int | None = None) -> Sequence[AttendingLayer]:
        """Return each layer's memory for the coming forward, of which the branch's session is told.

        Args:
            branch: guidance branch of the forward.
            step: denoising step; counted if None.

        Raises:
            BusyPipelineError, GradientError: in a step's callback; if gradients are enabled, but the buffer has none.
        """
        if torch.is_grad_enabled() and not self.buffer.differentiable:
            raise GradientError(
                "gradients are enabled inside generation, where recomputation would commit a chunk twice; "
                "remove torch.enable_grad() and torch.set_grad_enabled(True) from callbacks, hooks and wrappers"
            )
        if self.phase is None:
            raise BusyPipelineError("the transformer is called inside a chunk; call it between two, as in on_chunk")
        return self.phase.announce(self.session(branch), branch, step)

    def stats(self) -> dict[str, Any]:
        """Return tokens of one branch, bytes of all, and seconds of each part of the work."""
        stats = {"stack": self.stack.name, **stats_of_all(self.sessions), "seconds": dict(self.seconds)}
        return stats if self.link is None else {**stats, "sent_bytes": dict(self.link.sent)}

    def predict(self, branch: str, latents: Tensor, timesteps: Tensor, step: int) -> Tensor:
        """Return the transformer's output at a denoising step."""
        with self.during(Phase(steps=Counter({branch: step}))):
            return self.forward(branch, latents, timesteps)

    def agreed(self, latents: Tensor) -> Tensor:
        """Return a chunk's latents as the first process has them, which are those of all; see `Shard.same`."""
        return latents if self.link is None else self.link.same(latents)  # each device rounds its own way

    def check_finite(self, latents: Tensor, index: int) -> None:
        """Raise `NonFiniteLatentsError`, or the `PolicyError` that is its cause, if a chunk holds NaN or infinity."""
        if bool(latents.isfinite().all()):
            return
        with nullcontext() if self.guidance is None else self.guidance.link.together():  # every process comes here
            for session in self.sessions.values():
                session.check_policies()
        raise NonFiniteLatentsError(
            f"chunk {index} holds NaN or infinity after denoising; nothing of it was committed. "
            "Check the weights, the dtype and the callbacks"
        )

    def accepted(self, latents: Tensor, again: Callable[[], Tensor]) -> Tensor:
        """Return clean latents that the memory accepts; rows that it vetoes are made again.

        Args:
            latents: of the first try.
            again: denoises the chunk once more.
        """
        for _ in range(self.stack.max_retries):
            if (vetoed := self.vetoed(latents)) is None:
                return latents
            latents = torch.where(vetoed[:, None, None, None, None].to(latents.device), again(), latents)
        for session in self.sessions.values():
            session.settle()  # retries are used up: the last try is taken
        return latents

    def vetoed(self, latents: Tensor) -> Tensor | None:
        """Return which rows of the chunk the memory wants made anew, `[batch]`; None if it accepts all."""
        vetoes = [session.review(latents) for session in self.sessions.values()]  # all: each gets ready to retry
        made = [each for each in vetoes if each is not None]
        return torch.stack(made).any(dim=0) if made else None  # branches may veto different rows

    def commit(self, latents: Tensor, pixels: Tensor | None, *, given: bool = False) -> None:
        """Write a clean chunk into the history of every branch, or of none.

        Args:
            latents: the chunk's clean latents.
            pixels: the same decoded, if the stack needs them.
            given: whether they come from outside, so that no denoising forward has seen them.
        """
        with self.timed("compress"), self.writing():  # before anything is written, and once for all branches
            tokens = {piece: self.compress(piece, latents, pixels) for piece in self.pending_compressions}
        clean = self._clean.with_chunk(latents, tokens, pixels if self.stack.reencodes else None)
        with self._all_or_nothing():
            if self.stack.replays_always:
                self._replay(clean, latents.shape[2])
            else:
                self._commit(latents, tokens, again=given)
        self._clean = clean  # not before: what raises leaves everything as it was

    def set_prompt(self, conditioning: dict[str, Any], *, cut: bool = False) -> None:
        """Go on under another prompt: the memory is told, and what it computes anew with it is.

        Args:
            conditioning: what the transformer is told of it, by guidance branch.
            cut: whether a new scene begins.
        """
        with self._all_or_nothing():
            self.conditioning = conditioning
            for session in self.sessions.values():
                session.notify("prompt-changed")
                if cut:
                    session.notify("scene-cut")
            if self.sessions:  # there are none before the first chunk
                self._replay(self._clean)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        before = self.conditioning, [(session, session.past) for session in self.sessions.values()]
        try:
            with nullcontext() if self.guidance is None else self.guidance.block():
                yield
        except BaseException:  # an interrupt too
            self.conditioning, pasts = before
            for session, past in pasts:
                session.adopt(past)  # a past is never changed, only replaced
            raise

    def _replay(self, clean: CleanFrames, coming: int = 0) -> None:
        """Commit the last frames again; `coming` of them, the newest, for the first time."""
        if not (plan := self._first.replays(coming)):  # all branches have the same book
            return
        latents = clean.last(sum(plan))
        if self.stack.reencodes and sum(plan) < self.frames + coming:  # else it begins with the video's own first frame
            with self.timed("compress"), torch.no_grad():
                first = self.encode(clean.last_pixels(sum(plan))[:, :, :1])
            latents = torch.cat([first.to(latents), latents[:, :, 1:]], dim=2)
        for session in self.sessions.values():
            session.rewind(sum(plan) - coming)  # the coming ones are in no history yet
        for part in latents.split(plan, dim=2):
            self.expect(min(part.shape[2], self.stack.chunk_frames))  # a video's first chunk may be shorter
            self._commit(part, {piece: clean.tokens[piece] for piece in self.pending_compressions}, again=True)

    def _commit(self, latents: Tensor, tokens: Mapping[BlockEntry, Tensor], *, again: bool) -> None:
        last = max(each.step for each in self.sessions.values())
        for branch, session in self.sessions.items():
            # A branch that guidance left out of the last step has nothing of it to keep.
            rerun = again or self.stack.commit == "rerun" or session.step < last
            with self.writing():
                self.commit_branch(branch, latents, tokens, rerun=rerun)
        with self.timed("commit"):
            finish_commits([*self.sessions.values()], None if self.guidance is None else self.guidance.together())

    def commit_branch(self, branch: str, latents: Tensor, tokens: Mapping[BlockEntry, Tensor], *, rerun: bool) -> None:
        """Run the forwards whose keys and values become history of one branch.

        Args:
            branch: guidance branch.
            latents: the clean chunk.
            tokens: what `compress` made of its pieces.
            rerun: whether the chunk needs a forward; if not, its last denoising step is kept.
        """
        if rerun:
            # What a chunk leaves behind whole has no gradient: a graph spans one chunk.
            with self.timed("commit"), torch.no_grad(), self.during(Phase("commit", latents, tuple(tokens))):
                self.forward_clean(branch, latents)
