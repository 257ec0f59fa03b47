"""The history in Python ints: which frames are held whole, which compressed, and in which slot.

One ledger serves all layers, and the planner, which runs it without a model. It is a value: `commit` returns the
next one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from typing import Literal

from kvpack.errors import InvalidOptionError, PolicyError
from kvpack.memory.attribution import policy_call
from kvpack.memory.eviction import Eviction, evicted, grown_slots, merging
from kvpack.memory.roles import Part, Partitioner, Segment


def require_length(frames: int, chunk_frames: int, name: str = "a chunk") -> int:
    """Return `frames` if a chunk can be so long; `name` says whose length it is.

    Raises:
        InvalidOptionError: if it is no whole number, or longer than the chunks of the stack.
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or not 1 <= frames <= chunk_frames:
        raise InvalidOptionError(f"{name} has 1 to {chunk_frames} latent frames with this stack, got {frames!r}")
    return frames


@dataclass(frozen=True)
class BlockEntry:
    """History frames that always share one part, so that partitions are exact to the frame.

    Args:
        first_frame: index of the first frame.
        frames: number of frames.
        part: where the piece is now.
        slot: archive slot of a compressed piece.
        blocks: of how many blocks of one length a compressed piece was made.
        offered: how often a layer could choose it for a row, where the archive forgets by that.
        chosen: how often one did.
    """

    first_frame: int
    frames: int
    part: Part | Literal["dropped"] = "recent"
    slot: int = -1
    blocks: int = 1
    offered: int = 0
    chosen: int = 0

    @property
    def stop(self) -> int:
        """Index behind the last frame."""
        return self.first_frame + self.frames

    @property
    def block_frames(self) -> int:
        """Frames of each block in it."""
        return self.frames // self.blocks

    @classmethod
    def joined(cls, pieces: "Sequence[BlockEntry]") -> "BlockEntry":
        """Return neighbours as one, in the slot of the first."""
        if len(pieces) == 1:
            return pieces[0]
        frames, blocks = sum(each.frames for each in pieces), sum(each.blocks for each in pieces)
        return replace(pieces[0], frames=frames, blocks=blocks)


@dataclass(frozen=True)
class Step:
    """What a commit does to the pieces that were whole, the new ones included.

    Args:
        ledger: the history after the commit.
        kept: indices of whole pieces that stay whole.
        leaving: indices of whole pieces that are archived, with the slot of each.
        merged: archived pieces that become one, in the slot of the first.
    """

    ledger: "Ledger"
    kept: tuple[int, ...]
    leaving: tuple[tuple[int, int], ...]
    merged: tuple[tuple[BlockEntry, ...], ...] = ()


@dataclass(frozen=True)
class Ledger:
    """All bookkeeping of one generation.

    Args:
        partitioner: decides the part of every frame.
        chunk_frames: latent frames of a chunk.
        archive_blocks: most compressed blocks that are kept; None keeps all.
        eviction: which of them go.
        frames: committed latent frames.
        chunks: committed chunks.
        expected: latent frames of the coming chunk, if it is of another length than the rest.
        whole: pieces held at full resolution, oldest first.
        archive: compressed pieces, oldest first.
        seconds: spent inside each policy, by its class name; the ledgers of one generation count in one dict.
    """

    partitioner: Partitioner
    chunk_frames: int
    archive_blocks: int | None = None
    eviction: Eviction = "oldest"
    frames: int = 0
    chunks: int = 0
    expected: int | None = None
    whole: tuple[BlockEntry, ...] = ()
    archive: tuple[BlockEntry, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def coming(self) -> int:
        """Latent frames of the coming chunk."""
        return self.chunk_frames if self.expected is None else self.expected

    def expecting(self, frames: int) -> "Ledger":
        """Return the same history before a chunk of so many frames."""
        return replace(self, expected=require_length(frames, self.chunk_frames))

    def new_pieces(self) -> tuple[BlockEntry, ...]:
        """Return the coming chunk, cut wherever a part will ever begin or end."""
        start, stop = self.frames, self.frames + self.coming
        cuts = {start, stop}
        for history in self._until_settled():
            for segment in self._partition(history):  # of later histories too: a piece is never cut again
                cuts |= {cut for cut in (segment.frames.start, segment.frames.stop) if start < cut < stop}
        edges = sorted(cuts)
        return tuple(BlockEntry(a, b - a) for a, b in pairwise(edges))

    def compressed_pieces(self) -> tuple[BlockEntry, ...]:
        """Return the pieces of the coming chunk that will become part of mid and be kept there."""
        # An archive of no blocks needs no twins.
        parts = [self._parts(history) for history in self._until_settled()] if self.archive_blocks != 0 else []
        return tuple(piece for piece in self.new_pieces() if any(part_of(piece) == "mid" for part_of in parts))

    def commit(self, new_pieces: tuple[BlockEntry, ...] | None = None) -> Step:
        """Return the history with the coming chunk in it.

        Args:
            new_pieces: what `new_pieces()` gives, if that is known.

        Raises:
            PolicyError: if the partitioner breaks its contract.
        """
        history = self.frames + self.coming
        part_of = self._parts(history)
        coming = new_pieces or self.new_pieces()
        # What is in no segment is dropped for good.
        pieces = [replace(piece, part=part_of(piece) or "dropped") for piece in (*self.whole, *coming)]
        kept = tuple(index for index, piece in enumerate(pieces) if piece.part in ("sink", "recent"))
        archive = list(self.archive)
        while archive and part_of(archive[0]) is None:  # what leaves mid for no part is the oldest
            del archive[0]
        new = [index for index, piece in enumerate(pieces) if piece.part == "mid"]
        mid: list[tuple[BlockEntry, ...]] = [(piece,) for piece in (*archive, *(pieces[index] for index in new))]
        # With the new ones, so that the archive never exceeds its bound, not even for a moment.
        while self.archive_blocks is not None and len(mid) > self.archive_blocks:
            self._shorten(mid, history)
        archive = [BlockEntry.joined(group) for group in mid if group[0].slot >= 0]  # the new ones have no slot yet
        left = {piece.first_frame for group in mid for piece in group}
        # A new block may itself go, as all do if `archive_blocks` is 0.
        new = [index for index in new if pieces[index].first_frame in left]
        taken = {piece.slot for piece in archive}
        # The slot of a block that goes is free at once: `Stack.written` fills it when the commit is certain.
        free = (slot for slot in count() if slot not in taken)
        leaving = list(zip(new, free, strict=False))  # `free` has no end
        archive += [replace(pieces[index], slot=slot) for index, slot in leaving]
        whole = tuple(pieces[index] for index in kept)
        ledger = replace(
            self, frames=history, chunks=self.chunks + 1, expected=None, whole=whole, archive=tuple(archive)
        )
        ledger._check_whole()  # before anybody goes on from it
        return Step(ledger, kept, tuple(leaving), tuple(group for group in mid if len(group) > 1))

    def slots(self, held: int, slot: int, frames: int | None) -> int:
        """Return how many slots an archive of `held` gets for a block in `slot`.

        Args:
            held: slots it has.
            slot: index of the block's.
            frames: latent frames of the whole video, for which it then grows once; None if nobody knows.
        """
        if slot < held or frames is None:
            return grown_slots(held, slot, self.archive_blocks)
        # The last chunk is made whole, however few frames are wanted of it.
        history = -(-frames // self.chunk_frames) * self.chunk_frames
        mid = [len(segment.frames) for segment in self._partition(history) if segment.part == "mid"]
        each = len(replace(self, expected=None).new_pieces())  # a chunk may leave piece by piece
        blocks = each * sum(-(-length // self.chunk_frames) for length in mid)
        # At least `slot + 1`: a video may become longer than was said.
        return max(slot + 1, blocks if self.archive_blocks is None else min(blocks, self.archive_blocks))

    def counted(self, offered: int, chosen: Mapping[int, int]) -> "Ledger":
        """Return the same history with a chunk's choices in it.

        Args:
            offered: how many layers have chosen, for each row.
            chosen: how many of them have chosen the archived piece that begins with a frame.
        """
        archive = tuple(
            replace(piece, offered=piece.offered + offered, chosen=piece.chosen + chosen[piece.first_frame])
            if piece.first_frame in chosen
            else piece
            for piece in self.archive
        )
        return replace(self, archive=archive)

    def replayable(self, most_frames: int) -> tuple[int, ...]:
        """Frames of the last chunks, at most so many in all, of which each has recent frames or is still all whole."""
        lengths: tuple[int, ...] = ()
        while stop := self.frames - sum(lengths):
            length = min(self.chunk_frames, stop)  # a video's first chunk may be shorter
            pieces = [each for each in self.whole if stop - length <= each.first_frame < stop]
            whole = sum(piece.frames for piece in pieces) == length
            if sum(lengths) + length > most_frames or not (whole or any(piece.part == "recent" for piece in pieces)):
                break
            lengths = (length, *lengths)
        return lengths

    def rewound(self, frames: int) -> "Ledger":
        """Return the history without its last frames; what has left the recent ones since does not come back."""
        first, chunks = self.frames - frames, self.chunks - -(-frames // self.chunk_frames)
        return replace(
            self,
            frames=first,
            chunks=chunks,
            expected=None,
            whole=tuple(piece for piece in self.whole if piece.first_frame < first),
        )

    def replayed(self, aim: "Ledger") -> Step:
        """Return the history with those pieces of the coming chunk again that `aim` has, in its parts."""
        stop = self.frames + self.coming
        whole = tuple(piece for piece in aim.whole if piece.stop <= stop)
        firsts = {piece.first_frame for piece in whole}
        pieces = (*self.whole, *self.new_pieces())
        kept = tuple(index for index, piece in enumerate(pieces) if piece.first_frame in firsts)
        # Nothing is archived again: the archive has not been rewound.
        return Step(replace(self, frames=stop, chunks=self.chunks + 1, expected=None, whole=whole), kept, ())

    def _shorten(self, mid: list[tuple[BlockEntry, ...]], history: int) -> None:
        """Let one of the compressed pieces go, or two become one."""
        pieces = [BlockEntry.joined(group) for group in mid]
        first = merging(pieces, history) if self.eviction == "merged" else None
        if first is None:
            del mid[evicted(pieces, history, self.eviction)]
        else:
            mid[first : first + 2] = [mid[first] + mid[first + 1]]

    def _until_settled(self) -> range:
        """History lengths from the coming chunk's end on, until no frame of it changes its part any more."""
        stop = self.frames + self.coming
        horizon = -(-self.partitioner.horizon_frames // self.chunk_frames) * self.chunk_frames
        return range(stop, stop + horizon + 1, self.chunk_frames)

    def _parts(self, history: int) -> Callable[[BlockEntry], Part | None]:
        segments = self._partition(history)

        def part_of(piece: BlockEntry) -> Part | None:
            # The first frame says it for all: `new_pieces` has cut at every edge.
            return next((segment.part for segment in segments if piece.first_frame in segment.frames), None)

        return part_of

    def _partition(self, history: int) -> tuple[Segment, ...]:
        with policy_call(self.partitioner, "partition", self.seconds):
            segments = self.partitioner.partition(history, self.chunk_frames)
        if not isinstance(segments, tuple) or not all(isinstance(each, Segment) for each in segments):
            raise self._broken(f"returned {segments!r}", "it must be a tuple of Segments")
        position = 0
        for segment in segments:
            frames = segment.frames
            if segment.part not in ("sink", "mid", "recent") or frames.step != 1:
                raise self._broken(f"returned {segment}", "segments are sink, mid or recent, of consecutive frames")
            if len(frames) and (frames.start < position or frames.stop > history):
                raise self._broken(
                    f"returned {segment.part} {frames} of {history} frames", "segments ascend and stay in the history"
                )
            position = max(position, frames.stop)
        return segments

    def _check_whole(self) -> None:
        wanted = sum(len(segment.frames) for segment in self._partition(self.frames) if segment.part != "mid")
        held = sum(piece.frames for piece in self.whole)
        if held != wanted:
            # A frame that was dropped or compressed cannot come back.
            raise self._broken(f"wants {wanted} whole frames", f"{held} of them are still whole")

    def _broken(self, what: str, rule: str) -> PolicyError:
        return PolicyError(f"{type(self.partitioner).__name__}.partition {what}; {rule}")
