"""History that is dense nearby and sparse far away, neighbours merged as they age (FadeMem, arXiv 2606.10671)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float

from kvpack.errors import InvalidOptionError, require_int
from kvpack.memory import Attended, Chunk, StateMemory, Tokens
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.rope import wide_dtype


@dataclass(frozen=True, eq=False)
class Slot:
    """A frame of keys and values that stands for one frame or several.

    Args:
        center: latent frame of the video that it stands at.
        span: latent frames that it stands for.
        keys: keys before RoPE, one for each place of a frame.
        values: values.
    """

    center: int
    span: int
    keys: Float[torch.Tensor, "batch frame heads head_dim"]
    values: Float[torch.Tensor, "batch frame heads head_dim"]


@dataclass(frozen=True)
class FadeMem(StateMemory):
    """A fixed number of slots of a frame each; where they are used up, the two neighbours closest in age become one.

    Closeness is the distance of `age ** decay`, so that spans grow with age. Two slots are averaged with weights
    `span ** 0.5`. The video's first frame stays as it is, and only takes over the span of a neighbour; the newest slot
    is not merged. Once all slots are used, the first frame is at position 0, the last chunk right before the current
    one, and the rest between them at the whole positions that are nearest to their ages, none beyond those of training.

    Differs from the released code, whose window of exact frames beside the slots is empty: here there is none. Nothing
    is computed anew under another prompt, for merged frames have no latents.

    Args:
        chunk_frames: latent frames generated together.
        slots: frames' worth of tokens that are kept.
        decay: power of the age; the smaller, the denser nearby.
        train_frames: latent frames that the model saw in training; positions stay below.

    Raises:
        InvalidOptionError: if a size is not positive, the power is not in 0..1, or positions are fewer than slots.
    """

    chunk_frames: int = 3
    slots: int = 12
    decay: float = 0.3
    train_frames: int = 21
    name = "fademem"

    def __post_init__(self) -> None:
        require_int("chunk_frames", self.chunk_frames, minimum=1)
        require_int("slots", self.slots, minimum=2)
        require_int("train_frames", self.train_frames, minimum=1)
        if not 0 < self.decay <= 1:
            raise InvalidOptionError(f"decay must be a power > 0 and <= 1, got {self.decay}")
        if self.slots + self.chunk_frames > self.train_frames:
            raise InvalidOptionError(
                f"slots and the chunk must fit into train_frames, {self.train_frames}, got {self.slots} slots and "
                f"chunks of {self.chunk_frames}"
            )

    def attend(self, state: tuple[Slot, ...] | None, chunk: Chunk) -> Attended:
        """Attend all slots, at their frames until they are used up and there are more frames than positions."""
        state, device = state or (), chunk.tokens.keys.device
        grid = grid_coordinates(1, chunk.geometry.grid).to(device, wide_dtype(device))[None]
        places, start = [each.center for each in state], chunk.first_frame
        # Before that the true positions are within those of training.
        if len(state) == self.slots and start >= self.train_frames - self.chunk_frames:
            places, start = self.places(places, start), self.train_frames - self.chunk_frames
        slots = zip(state, places, strict=True)
        return Attended(
            tuple(Tokens(each.keys, each.values, grid).moved(float(at)) for each, at in slots), start, state
        )

    def remember(self, state: tuple[Slot, ...], chunk: Chunk) -> tuple[Slot, ...]:
        """Give each frame of the clean chunk a slot, and merge others where none is free."""
        each, now = chunk.geometry.tokens_per_frame, chunk.first_frame + chunk.frames
        for index in range(chunk.frames):
            # A slice would keep the whole chunk alive.
            frame = chunk.tokens[index * each : (index + 1) * each].compact()
            state = (*state, Slot(chunk.first_frame + index, 1, frame.keys, frame.values))
            if len(state) > self.slots:
                at = self.closest([slot.center for slot in state], now)
                state = (*state[:at], _merged(state[at], state[at + 1]), *state[at + 2 :])
        return state

    def closest(self, centers: list[int], now: int) -> int:
        """Return the first of the two neighbours that are merged; the newest slot is none of them.

        >>> FadeMem(decay=0.3).closest([0, 4, 5, 6, 7, 8], 9)
        1
        """
        ages = [(now - center) ** self.decay for center in centers[:-1]]
        gaps = [older - newer for older, newer in pairwise(ages)]  # ages fall from slot to slot, so none is negative
        return gaps.index(min(gaps)) if gaps else 0  # the oldest of equal ones

    def places(self, centers: list[int], now: int) -> list[int]:
        """Return positions of slots, ascending, for a chunk that begins at frame `now`.

        >>> FadeMem().places([0, 20, 40, 50, 56, 57, 58, 59], 60)
        [0, 1, 2, 8, 14, 15, 16, 17]
        """
        start = self.train_frames - self.chunk_frames
        near = min(self.chunk_frames, len(centers) - 1)  # the last chunk keeps its distance
        far = centers[1 : len(centers) - near]
        placed, before = [0], start
        for index, center in enumerate(far):
            low = near + len(far) - index  # what is newer needs positions as well
            # Its age, but a place of its own, and none that newer ones need.
            before = min(max(now - center, low), before - 1)
            placed.append(start - before)
        return placed + list(range(start - near, start))


def _merged(older: Slot, newer: Slot) -> Slot:
    """Return one slot for two; the video's first frame stays what it is."""
    span = older.span + newer.span
    if older.center == 0:
        return Slot(0, span, older.keys, older.values)
    share = newer.span**0.5 / (older.span**0.5 + newer.span**0.5)
    # The mean over the frames they stand for.
    center = round((older.span * older.center + newer.span * newer.center) / span)

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.float().lerp(b.float(), share).to(a)  # in float32, and rounded once

    return Slot(center, span, mean(older.keys, newer.keys), mean(older.values, newer.values))
