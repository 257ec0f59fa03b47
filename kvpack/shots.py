"""Prompts that change while a video is generated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kvpack.errors import InvalidOptionError

Prompt = str | list[str]
_FORM = '[(0, "a ..."), (20, "then ..."), (40, "elsewhere ...", "cut")]'


@dataclass(frozen=True)
class Shot:
    """A prompt and when it begins.

    Args:
        seconds: of the video, where it begins.
        prompt: a text, or one for each video of a batch; None where embeddings are given.
        cut: whether it is another scene.
    """

    seconds: float
    prompt: Prompt | None
    cut: bool = False

    def chunk(self, fps: float, chunk_frames: int, temporal_scale: int) -> int:
        """The chunk whose beginning is nearest; a video's first latent frame stands for one pixel frame.

        >>> [Shot(seconds, "").chunk(16.0, 4, 4) for seconds in (0, 5, 20)]
        [0, 5, 20]
        """
        frames = self.seconds * fps
        return round((frames + temporal_scale - 1) / (chunk_frames * temporal_scale)) if frames else 0


def shots(prompt: Any) -> list[Shot]:
    """The shots of a prompt, which is one text, one for each video, or a schedule of them.

    Raises:
        InvalidOptionError: if it is meant as a schedule, but is none.

    >>> [shot.seconds for shot in shots([(0, "a fox"), (20, "then it rests", "cut")])]
    [0.0, 20.0]
    """
    if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not any(isinstance(s, tuple) for s in prompt):
        return [Shot(0.0, prompt)]
    schedule = [_shot(entry) for entry in prompt]
    if schedule[0].seconds != 0:
        raise InvalidOptionError(f"a prompt schedule begins at 0 seconds, got {schedule[0].seconds:g}; e.g. {_FORM}")
    for before, after in pairwise(schedule):
        if after.seconds <= before.seconds:
            raise InvalidOptionError(
                f"the seconds of a prompt schedule ascend, got {after.seconds:g} behind {before.seconds:g}"
            )
    batches = {len(shot.prompt) if isinstance(shot.prompt, list) else 1 for shot in schedule}
    if len(batches) > 1:
        raise InvalidOptionError(f"all prompts of a schedule are of one batch, got batches of {sorted(batches)}")
    return schedule


def _shot(entry: Any) -> Shot:
    if not isinstance(entry, tuple) or len(entry) not in (2, 3):
        raise InvalidOptionError(f"an entry of a prompt schedule is (seconds, prompt), got {entry!r}; e.g. {_FORM}")
    seconds, prompt, *cut = entry
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not math.isfinite(seconds) or seconds < 0:
        raise InvalidOptionError(f"a prompt schedule begins its prompts at seconds >= 0, got {seconds!r}; e.g. {_FORM}")
    texts = prompt if isinstance(prompt, list) else [prompt]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidOptionError(f"a prompt is a text, or a list of texts for a batch, got {prompt!r}")
    if cut not in ([], ["cut"]):
        raise InvalidOptionError(f'the third part of an entry is "cut" or not there, got {cut[0]!r}; e.g. {_FORM}')
    return Shot(float(seconds), prompt, bool(cut))
