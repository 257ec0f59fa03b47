"""Watches a video go by and keeps a few numbers a frame."""

from typing import Any

import numpy as np

from kvpack.errors import InvalidOptionError
from kvpack.evaluation import motion, subject, surroundings
from kvpack.evaluation.facts import Facts, Mask, Values
from kvpack.evaluation.grid import grown, means, require_frames, thumbnail_size, working_size
from kvpack.evaluation.observation import REFERENCE_SECONDS, Observation
from kvpack.media.video import Frames

BLOCK = 64  # frames that are looked at together; always the same, so that a stream and a whole give equal bits
FLOW_PAIRS = 2  # a second


class Observer:
    """Reads a video in pieces of any length, and keeps a few statistics of each frame.

    Where the subject is told by a median frame, the first five seconds are held, at 64 rows at most.
    """

    def __init__(self, facts: Facts | None = None) -> None:
        self.facts = facts or Facts()
        self._size: tuple[int, int] | None = None
        self._waiting: list[Frames] = []
        self._median: Values | None = None
        self._seen: list[dict[str, Any]] = []
        self._last: tuple[Values, Mask] | None = None
        self._pairs: dict[int, list[Values]] = {}
        self._done = 0

    def add(self, frames: Frames) -> None:
        """Add the next frames, uint8 [t, H, W, 3].

        Raises:
            InvalidOptionError: if they are no such array, or of another size than the frames or facts before.
        """
        size = require_frames(frames).shape[1:3]
        if self._size is None:
            self.facts.require_size(*size)
            self._size = (size[0], size[1])
            self._prepare(*working_size(*size))
        if size != self._size:
            before, now = ("x".join(map(str, each)) for each in (self._size, size))
            raise InvalidOptionError(f"all frames of a video must have one size, {before} so far, got {now}")
        step = max(1, (1 << 22) // frames[0].size)  # of large frames a few at a time
        for begin in range(0, len(frames), step):
            part = frames[begin : begin + step]
            self._waiting.append(self._reduced(part) if working_size(*size) != size else part.copy())
        self._look(flush=False)

    def finish(self) -> Observation:
        """Return the statistics of all frames.

        Raises:
            InvalidOptionError: if no frame was added.
        """
        if self._size is None:
            raise InvalidOptionError("an observation needs at least one frame, got none; call add(frames) first")
        self._look(flush=True)
        seen = {name: np.concatenate([part[name] for part in self._seen]) for name in self._seen[0]}
        flow, at = np.zeros(0, np.float32), np.zeros(0, np.int64)
        if self.facts.subject is None and np.isfinite(seen["area"]).mean() < 0.5:
            pairs = {frame: pair for frame, pair in self._pairs.items() if len(pair) == 2}
            speeds = [motion.flow_speed(a, b, self.facts.fps) for a, b in pairs.values()]
            flow, at = np.array(speeds, np.float32), np.array(list(pairs), np.int64)
        return Observation(fps=float(self.facts.fps), flow=flow, flow_frame=at, **seen)

    def _prepare(self, height: int, width: int) -> None:
        facts, cells = self.facts, thumbnail_size(height, width)
        self._places = [means(place, height, width) > 0.5 for place in facts.landmarks.values()]
        taken = np.logical_or.reduce(self._places) if self._places else np.zeros((height, width), bool)
        self._taken, self._shut = taken, ~grown(taken[None])
        self._glow = {
            index: means(facts.glow[name], *cells) for index, name in enumerate(facts.landmarks) if name in facts.glow
        }
        self._palette = np.array(list(facts.palette.values()), np.float32)
        self._shapes = np.stack([subject.template(drawn) for drawn in facts.shapes.values()]) if facts.shapes else None
        grounds = [means(drawn.transpose(2, 0, 1), *cells) for drawn in facts.backgrounds.values()]
        self._grounds = np.stack(grounds) if grounds else None

    def _reduced(self, frames: Frames) -> Frames:
        small = means(frames.transpose(0, 3, 1, 2), *working_size(*frames.shape[1:3]))
        return small.transpose(0, 2, 3, 1).round().astype(np.uint8)

    def _look(self, flush: bool) -> None:
        count = sum(map(len, self._waiting))
        learning = self.facts.subject is None and self._median is None
        wanted = max(BLOCK, round(REFERENCE_SECONDS * self.facts.fps)) if learning else BLOCK
        if count < wanted and not (flush and count):
            return
        frames = np.concatenate(self._waiting)
        if learning:
            first = frames[: max(1, round(REFERENCE_SECONDS * self.facts.fps))]
            self._median = _planes(np.median(first, axis=0)[None].astype(np.uint8))[0]
        begin = 0
        while len(frames) - begin >= (1 if flush else BLOCK):
            self._seen.append(self._block(frames[begin : begin + BLOCK]))
            begin += BLOCK
        self._waiting = [frames[begin:]] if begin < len(frames) else []

    def _block(self, frames: Frames) -> dict[str, Any]:
        facts, planes = self.facts, _planes(frames)
        if facts.subject is not None:
            soft = np.asarray(facts.subject(frames), np.float32)
        else:
            assert self._median is not None
            soft = subject.differing(planes, self._median)
        soft = soft * ~self._taken
        seen = subject.look(planes, soft)
        keep = ~grown(seen.mask) & self._shut
        on, lamps = surroundings.landmarks(frames, self._places, facts.bright)
        ground = surroundings.thumbnails(planes, keep)
        for index, glow in self._glow.items():
            ground -= glow * (lamps[:, index] * on[:, index, None])[:, :, None, None]
        before, kept = self._last or (planes[:1], np.zeros_like(keep[:1]))
        change = surroundings.flicker(np.concatenate([before, planes]), np.concatenate([kept, keep]))
        self._last = (planes[-1:].copy(), keep[-1:])
        self._keep_pairs(planes)
        return {
            "centre": seen.centre,
            "area": seen.area,
            "colour": seen.colour,
            "form": np.round(seen.form * 255).astype(np.uint8),
            "background": ground.astype(np.float16),
            "flicker": change,
            "checks": self._checks(seen, ground),
            "landmark_on": on,
            "landmark_colour": lamps,
        }

    def _keep_pairs(self, planes: Values) -> None:
        if self.facts.subject is None:
            step = max(2, round(self.facts.fps / FLOW_PAIRS))  # pairs of successive frames, far enough apart to be few
            for index, frame in enumerate(planes, self._done):
                if index % step < 2:
                    self._pairs.setdefault(index - index % step, []).append(frame.mean(0))
        self._done += len(planes)

    def _checks(self, seen: subject.Looks, ground: Values) -> Values:
        facts, visible = self.facts, np.isfinite(seen.area)
        checks = np.full((len(ground), 3), np.nan, np.float32)
        if facts.colour is not None:
            found = subject.nearest(np.nan_to_num(seen.colour), self._palette)
            checks[:, 0] = visible & (found == list(facts.palette).index(facts.colour))
        if facts.shape is not None and self._shapes is not None:
            found = subject.nearest(seen.form, self._shapes)
            checks[:, 1] = visible & (found == list(facts.shapes).index(facts.shape))
        if facts.background is not None and self._grounds is not None:
            error = np.abs(ground[:, None] - self._grounds)
            known = np.isfinite(ground).reshape(len(ground), -1).max(1)  # [frames], of [frames, ...]
            found = np.nan_to_num(error).sum((2, 3, 4)).argmin(1)
            checks[:, 2] = known & (found == list(facts.backgrounds).index(facts.background))
        return checks


def _planes(frames: Frames) -> Values:
    """Convert frames [t, h, w, 3] to [t, 3, h, w] in 0..1; sums over long rows are fast."""
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
