"""The measures of a part of a video, each higher where the video is better."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvpack.errors import InvalidOptionError
from kvpack.evaluation.facts import Mask, Values
from kvpack.evaluation.motion import coherent_speed
from kvpack.evaluation.observation import Observation

METRICS = (
    "subject_consistency",
    "background_consistency",
    "dynamic_degree",
    "prompt_alignment",
    "temporal_flickering",
    "revisit_consistency",
)
#: Names of the measures of a video without facts, where the same formulas answer other questions.
GENERAL = {
    "subject_consistency": "foreground_likeness",  # what differs from the median frame
    "background_consistency": "surroundings_likeness",  # all else, lamps and shadows included
    "dynamic_degree": "motion_speed",  # of that foreground, or of optical flow
    "temporal_flickering": "steadiness",
    "revisit_consistency": "return_colour",  # of that foreground when it is back
}
OTHER_COLOUR = 0.5  # distance in RGB at which a colour is another
SAME_FORM, OTHER_FORM = 0.95, 0.65  # overlap over union: pixels alone cost the one, another shape the other
OTHER_BACKGROUND = 0.2  # error in 0..1, root mean square, at which a background is another
FULL_FLICKER = 0.1  # mean change a frame in 0..1 at which nothing is steady
EVENT_FRAMES = 3  # a shorter time on, or off, is noise
REFERENCE_STRIDE = 3  # odd, so that both halves of a flicker are known


def measures(observation: Observation, begin: int, end: int) -> dict[str, float]:
    """Measure the frames from `begin` up to `end`, compared with the first five seconds.

    All lie in 0..1 but `dynamic_degree`, which is in frame heights a second. What can't be said is NaN: motion in
    less than 0.75 seconds, alignment with no name, flicker of one frame, and returns where nothing returned.

    Raises:
        InvalidOptionError: if there are no such frames.
    """
    if not 0 <= begin < end <= observation.frames:
        raise InvalidOptionError(
            f"frames must lie in 0 <= begin < end <= {observation.frames}, got begin={begin} and end={end}"
        )
    part = slice(begin, end)
    return {
        "subject_consistency": float(subject_likeness(observation)[part].mean()),
        "background_consistency": float(background_likeness(observation, part).mean()),
        "dynamic_degree": _motion(observation, part),
        "prompt_alignment": _mean(observation.checks[part]),
        "temporal_flickering": _steadiness(observation.flicker[part]),
        "revisit_consistency": _mean(
            np.array([score for frame, score in returns(observation) if begin <= frame < end])
        ),
    }


def drift(observation: Observation) -> dict[str, float]:
    """Subtract the measures of the first five seconds from those of the last; NaN where either is, or they overlap."""
    length = observation.reference_frames
    if observation.frames < 2 * length:
        return dict.fromkeys(METRICS, math.nan)
    first, last = (measures(observation, at, at + length) for at in (0, observation.frames - length))
    return {name: last[name] - first[name] for name in METRICS}


def general_measures(observation: Observation) -> tuple[dict[str, float], dict[str, float]]:
    """Return the measures of all frames, and their drift, of a video that was observed without facts.

    All lie in 0..1 but `motion_speed`, which is in frame heights a second; what can't be said is NaN.
    """
    whole, change = measures(observation, 0, observation.frames), drift(observation)
    return {name: whole[each] for each, name in GENERAL.items()}, {name: change[each] for each, name in GENERAL.items()}


def subject_likeness(observation: Observation) -> Values:
    """Return how alike the subject stays, [T] in 0..1: colour times form times area; 0 where it isn't visible."""
    visible = observation.visible
    first = np.nonzero(visible[: observation.reference_frames])[0]
    if not len(first):
        return np.zeros(observation.frames, np.float32)
    form = observation.form.reshape(observation.frames, -1).astype(np.float32)  # [frames, cells]
    usual = np.median(form[first], axis=0)
    union = np.maximum(form, usual).sum(1)
    overlap = np.minimum(form, usual).sum(1) / np.maximum(union, 1e-6)
    area = np.where(visible, observation.area, 1.0)
    ratio = area / np.median(area[first])
    colour = _same_colour(np.where(visible[:, None], observation.colour, 0.0), np.median(observation.colour[first], 0))
    likeness = colour * np.minimum(ratio, 1 / ratio) * np.clip((overlap - OTHER_FORM) / (SAME_FORM - OTHER_FORM), 0, 1)
    return np.where(visible, likeness, 0.0).astype(np.float32)


def background_likeness(observation: Observation, part: slice) -> Values:
    """Return how near each background of a part is to the nearest of the first five seconds, [t] in 0..1."""
    known = observation.background.astype(np.float32).reshape(observation.frames, -1)  # [frames, cells]
    seen, usual = known[part], known[: observation.reference_frames : REFERENCE_STRIDE]
    here, there = np.isfinite(seen).astype(np.float32), np.isfinite(usual).astype(np.float32)
    a, b = np.nan_to_num(seen), np.nan_to_num(usual)
    # Sum of squared differences where both are known, as products of matrices.
    error = (a * a) @ there.T - 2 * (a @ b.T) + here @ (b * b).T
    count = here @ there.T
    root = np.sqrt(np.maximum(error, 0) / np.maximum(count, 1))
    nearest = np.where(count > 0, root, OTHER_BACKGROUND).min(1)
    return np.clip(1 - nearest / OTHER_BACKGROUND, 0, 1).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Look:
    """A time when something was on: its frames, from `begin` up to `end`, and its colour, [3]."""

    begin: int
    end: int
    colour: np.ndarray

    def likeness(self, other: "Look") -> float:
        """Return how near two colours are, 1 if they are the same, 0 from half of the range on."""
        return float(_same_colour(self.colour, other.colour))


def looks(observation: Observation) -> list[tuple[Mask, list[Look]]]:
    """Return in which frames each landmark is on, [T], and its times on, oldest first; those of the subject without."""
    pairs = list(zip(observation.landmark_on.T, observation.landmark_colour.swapaxes(0, 1), strict=True))
    return [
        (on, [Look(begin, end, np.median(colour[begin:end][on[begin:end]], axis=0)) for begin, end in _runs(on)])
        for on, colour in pairs or [(observation.visible, observation.colour)]
    ]


def returns(observation: Observation) -> list[tuple[int, float]]:
    """Return frame and score in 0..1 of every reappearance: whether a landmark is lit again in its first colour.

    Without landmarks, whether the subject has the colour of its first time when it is back.
    """
    return sorted((each.begin, each.likeness(times[0])) for _, times in looks(observation) for each in times[1:])


def _runs(on: Mask) -> Iterator[tuple[int, int]]:
    """Yield begin and end of every time on of at least three frames; shorter times off are bridged."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], on, [False]]).astype(np.int8)))
    runs = edges.reshape(-1, 2)  # [times, begin and end]
    joined: list[list[int]] = []
    for begin, end in runs.tolist():
        if joined and begin - joined[-1][1] < EVENT_FRAMES:
            joined[-1][1] = end
        else:
            joined.append([begin, end])
    yield from ((begin, end) for begin, end in joined if end - begin >= EVENT_FRAMES)


def _same_colour(colour: np.ndarray, usual: np.ndarray) -> np.ndarray:
    distance = np.sqrt(((colour - usual) ** 2).sum(-1))
    return np.asarray(1 - np.minimum(1, distance / OTHER_COLOUR))


def _motion(observation: Observation, part: slice) -> float:
    if not len(observation.flow_frame):
        return coherent_speed(observation.centre[part], observation.fps)
    inside = (observation.flow_frame >= part.start) & (observation.flow_frame < part.stop)
    return _mean(observation.flow[inside])


def _steadiness(change: Values) -> float:
    known = change[np.isfinite(change)]
    return float(np.clip(1 - np.median(known) / FULL_FLICKER, 0, 1)) if len(known) else float("nan")


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
