"""The only mutable thing: all memory of one generation, one session for each guidance branch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kvpack.memory.attribution import blamed
from kvpack.memory.base import Event
from kvpack.memory.blocks import KVBlock, Span, check_block, grid_coordinates, owned
from kvpack.memory.geometry import Geometry
from kvpack.memory.layer import KeysValues, LayerMemory
from kvpack.memory.ledger import Ledger, Piece
from kvpack.memory.plan import Context, Held
from kvpack.memory.roles import LatentCompressor, Placement
from kvpack.memory.stack import Stack
from kvpack.memory.state_session import StateSession
from kvpack.memory.store import PackedBuffer

#: All memory of one generation and guidance branch.
AnySession: TypeAlias = "Session | StateSession"


@dataclass(frozen=True, eq=False)
class History:
    """Everything committed so far; replaced as a whole, so that a commit is all or nothing."""

    ledger: Ledger
    held: tuple[Held, ...] = ()
    #: The ledger that a replay will have come back to.
    aim: Ledger | None = None


class Session:
    """Memory of one generation.

    A chunk is: `denoise(step)` before each denoising forward, `commit()` before the forward of the clean chunk, and
    `finish_commit()`. Only the last one writes history; until then the chunk can be done again. A stack whose `commit`
    is "last-step" needs no `commit()`: the keys and values of the last denoising forward are kept. A chunk shorter than
    the rest is announced by `expect(frames)`. Of a latent-space compressor, the tokens of `twins_due()` ride in the
    commit's forward, or each has one of its own after `compress(piece)`.

    Args:
        stack: the policy.
        geometry: the model.
        buffer: what a layer attends.
    """

    def __init__(self, stack: Stack, geometry: Geometry, buffer: type[PackedBuffer] = PackedBuffer) -> None:
        self.stack, self.geometry, self.buffer = stack, geometry, buffer
        self.history = History(Ledger(stack.partitioner, stack.chunk_frames, stack.archive_blocks))
        spans = (stack.compressor.span(0, frames, geometry.grid) for frames in range(1, stack.chunk_frames + 1))
        slot_tokens = max(span.tokens for span in spans)
        self.layers = [LayerMemory(index, slot_tokens, buffer()) for index in range(geometry.layers)]
        self.current: Context | None = None
        self._twins: list[Piece] = []
        #: Denoising step of the chunk in progress that was announced last; -1 before the first.
        self.step = -1

    @property
    def frames(self) -> int:
        """Committed latent frames."""
        return self.history.ledger.frames

    @property
    def policy_seconds(self) -> dict[str, float]:
        """Seconds of the host inside each policy's own methods, by its class name."""
        return self.history.ledger.seconds

    @property
    def coming_frames(self) -> int:
        """Latent frames of the coming chunk, or of the one in progress."""
        return self.history.ledger.coming

    def expect(self, frames: int) -> None:
        """Announces a chunk of so many latent frames: at most a chunk, and less only for a video's first or last."""
        self.adopt(replace(self.history, ledger=self.history.ledger.expecting(frames)))

    def denoise(self, step: int) -> None:
        """Announces a denoising forward; step 0 chooses and places the history anew. Never writes history."""
        if step == 0 or self.current is None:
            self._assemble()
        self._listen(self.stack.commit == "last-step")
        self.step = step

    def commit(self, twins: Sequence[Piece] = (), latents: Tensor | None = None) -> None:
        """Announces the forward of the clean chunk, whose keys and values become history.

        Args:
            twins: pieces whose twins' tokens follow the chunk's in the forward.
            latents: the clean chunk, for a memory that looks at it; a stack does not.
        """
        if self.current is None:
            self._assemble()
        self._listen(True, twins)

    def twins_due(self) -> tuple[Piece, ...]:
        """Pieces of the coming chunk that a latent-space compressor must make twins of."""
        if not isinstance(self.stack.compressor, LatentCompressor):
            return ()
        ledger = self.history.ledger
        return tuple(piece for piece in ledger.new_pieces() if ledger.is_ever_compressed(piece))

    def twin_span(self, piece: Piece) -> Span:
        """Tokens that will stand for a piece; their times count from the chunk's first frame."""
        span = self.stack.compressor.span(piece.first_frame, piece.frames, self.geometry.grid)
        offset = torch.tensor([float(piece.first_frame - self.frames), 0.0, 0.0])
        return replace(span, coordinates=span.coordinates + offset)

    def compress(self, piece: Piece) -> None:
        """Announces the forward of a twin's tokens, in the context that the commit saw; follows the commit's."""
        self._twins.append(piece)
        for layer in self.layers:
            layer.with_chunk, layer.twins = False, self._twin_turns([piece])

    def check_policies(self) -> None:
        """Raises `PolicyError` if a policy broke its contract in the chunk in progress; waits for the device."""
        assert self.current is not None
        for layer in self.layers:
            layer.check_choice(self.current)

    def finish_commit(self) -> None:
        """Writes the committed chunk into history, and moves what leaves the recent frames into the archive.

        Raises:
            PolicyError: if a policy broke its contract in this chunk; history is then as it was.
        """
        self.adopt(self.prepared())

    def prepared(self) -> History:
        """History with the committed chunk in it; touches nothing that the present one uses."""
        self.check_policies()
        aim = self.history.aim
        step = self.history.ledger.commit() if aim is None else self.history.ledger.replayed(aim)
        held = (*self.history.held, *self._new_pieces())
        for index, slot in step.leaving:
            self._archive(held[index], slot)
        kept = tuple(replace(held[i], piece=piece) for i, piece in zip(step.kept, step.ledger.whole, strict=True))
        return History(step.ledger, kept, aim if aim is not None and step.ledger.frames < aim.frames else None)

    @property
    def past(self) -> History:
        """Everything committed so far; `adopt` brings it back."""
        return self.history

    def replays(self, coming: int = 0) -> tuple[int, ...]:
        """Frames of each forward of a replay, oldest first.

        Args:
            coming: frames of a chunk that is not committed yet and is the last of them.
        """
        frames = self.history.ledger.replayable(self.stack.replay_frames)
        return (self.stack.chunk_frames,) * (frames // self.stack.chunk_frames)

    def rewind(self, frames: int) -> None:
        """Takes the last frames out of history; they must be committed again, one of `replays` after the other."""
        ledger = self.history.ledger.rewound(frames)
        held = tuple(held for held in self.history.held if held.piece.first_frame < ledger.frames)
        self.adopt(History(ledger, held, self.history.ledger))

    def tell(self, event: Event) -> None:
        """Nothing that happens between two chunks changes a stack's history, unless it is replayed."""

    def review(self, latents: Tensor) -> Tensor | None:
        """A stack has no veto."""
        return None

    def settle(self) -> None:
        """A stack has no veto."""

    def adopt(self, history: History) -> None:
        """Ends the chunk in progress."""
        self.history, self.current, self.step = history, None, -1
        self._listen(False)  # what was captured is committed once

    def attended(self, layer: int) -> KeysValues:
        """Rotated keys and values of history that a layer attends for the chunk in progress, or attended last."""
        buffer = self.layers[layer].buffer
        longest = max(buffer.lengths, default=0)
        return buffer.keys[:, :longest], buffer.values[:, :longest]

    def snapshot(self) -> "Session":
        """An independent copy at the last commit, to resume or to fork from."""
        copy = Session(self.stack, self.geometry, self.buffer)
        copy.history = replace(self.history, ledger=replace(self.history.ledger, seconds={}))
        for mine, theirs in zip(self.layers, copy.layers, strict=True):
            theirs.archive = mine.archive.clone()
        return copy

    def stats(self) -> dict[str, Any]:
        """Tokens and bytes of this session.

        `attended_*` are those of the last chunk's history, without the chunk; `archive_*` all compressed blocks that
        are kept, attended or not; `resident_bytes` all memory allocated: buffer, whole pieces and archive with its
        spare slots.
        """
        ledger, tokens_per_frame = self.history.ledger, self.geometry.tokens_per_frame
        lengths = self.layers[0].buffer.lengths
        views = [view for index in range(self.geometry.layers) for view in self._attended(index)]
        whole = {
            part: tokens_per_frame * sum(p.frames for p in ledger.whole if p.part == part)
            for part in ("sink", "recent")
        }
        blocks = [self._archived(layer, piece) for layer in self.layers for piece in ledger.archive]
        stored = [
            t for held in self.history.held for layer in (held.layers, held.twin or ()) for kv in layer for t in kv
        ]
        buffers = [t for layer in self.layers for t in (layer.buffer.keys, layer.buffer.values)]
        slabs = [t for m in self.layers for t in (m.archive.keys, m.archive.values, m.archive.key_sums)]
        return {
            "stack": self.stack.name,
            "chunks": ledger.chunks,
            "frames": ledger.frames,
            "sink_tokens": whole["sink"],
            "recent_tokens": whole["recent"],
            "attended_tokens": max(lengths, default=0),
            "attended_bytes": sum(view.nbytes for view in views),
            "archive_blocks": len(ledger.archive),
            "archive_bytes": sum(tensor.nbytes for block in blocks for tensor in block),
            "resident_bytes": sum(tensor.nbytes for tensor in (*stored, *buffers, *slabs)),
            "selected": self._selected(),
            "policy_seconds": dict(self.policy_seconds),
        }

    def _selected(self) -> list[list[list[int]]] | None:
        if self.layers[0].chosen is None:
            return None
        return [layer.chosen.tolist() for layer in self.layers if layer.chosen is not None]

    def _attended(self, index: int) -> list[Tensor]:
        buffer = self.layers[index].buffer
        return [t[row, :length] for row, length in enumerate(buffer.lengths) for t in (buffer.keys, buffer.values)]

    def _archived(self, layer: LayerMemory, piece: Piece) -> KeysValues:
        tokens = self.stack.compressor.span(piece.first_frame, piece.frames, self.geometry.grid).tokens
        return layer.archive.keys[:, piece.slot, :tokens], layer.archive.values[:, piece.slot, :tokens]

    def _assemble(self) -> None:
        self.current = Context(self.stack, self.geometry, self.history.ledger, self.history.held)
        for layer in self.layers:
            layer.pending = self.current

    def _listen(self, capture: bool, twins: Sequence[Piece] = ()) -> None:
        self._twins = list(twins)
        turns = self._twin_turns(twins)
        for layer in self.layers:
            layer.capture = [] if capture else None
            layer.with_chunk, layer.twins = True, turns

    def _twin_turns(self, pieces: Sequence[Piece]) -> list[Callable[[Placement], Tensor]]:
        """Rotations of twins' tokens, once it is known where the chunk is placed."""
        if not pieces:
            return []
        assert self.current is not None
        chunk_turns = self.current.chunk_turns
        return [partial(chunk_turns, coordinates=self.twin_span(piece).coordinates) for piece in pieces]

    def _new_pieces(self) -> list[Held]:
        first, per_frame = self.frames, self.geometry.tokens_per_frame
        captured = [layer.capture or [] for layer in self.layers]
        if {len(forwards) for forwards in captured} != {1 + len(self._twins)}:
            raise RuntimeError("finish_commit() must follow commit() and a forward of the chunk and of each twin")
        chunk = [forwards[0] for forwards in captured]
        twins = {piece: tuple(f[index] for f in captured) for index, piece in enumerate(self._twins, start=1)}
        pieces = []
        for piece in self.history.ledger.new_pieces():
            cut = slice((piece.first_frame - first) * per_frame, (piece.stop - first) * per_frame)
            layers = tuple((owned(keys, cut), owned(values, cut)) for keys, values in chunk)
            pieces.append(Held(piece, layers, twins.get(piece)))
        return pieces

    def _archive(self, held: Held, slot: int) -> None:
        compressor, grid = self.stack.compressor, self.geometry.grid
        span = compressor.span(held.piece.first_frame, held.piece.frames, grid)
        whole = Span(held.piece.first_frame, held.piece.frames, grid_coordinates(held.piece.frames, grid))
        for index, (keys, values) in enumerate(held.layers):
            if held.twin is not None:
                block = KVBlock(*held.twin[index], span)
            else:
                with blamed(compressor, "compress", self.policy_seconds, index):
                    block = compressor.compress(KVBlock(keys, values, whole), grid)
            check_block(compressor, block, span, keys, index)
            self.layers[index].archive.write(slot, block.keys, block.values)


def finish_commits(sessions: "Sequence[AnySession]") -> None:
    """Finishes the commit of all guidance branches of a generation, or of none.

    Raises:
        PolicyError: if a policy broke its contract in this chunk; every history is then as it was.
    """
    histories: list[Any] = [session.prepared() for session in sessions]
    for session, history in zip(sessions, histories, strict=True):
        session.adopt(history)
