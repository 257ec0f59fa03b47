"""What a batch makes: settings that all its videos share, and a video for each line of a file of prompts."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpack.checkpoints.text import prompt_lines
from kvpack.errors import InvalidOptionError, require_seed
from kvpack.generation.prompts import shots
from kvpack.planning.planner import video_frames

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # no dot in front, which would be hidden or `..`
_KEYS = ("prompt", "name", "seed", "seconds", "negative_prompt")


@dataclass(frozen=True)
class Video:
    """One video of a batch.

    Args:
        name: of its file, without `.mp4`.
        prompt: a text, or a schedule.
        seed: of the noise.
        seconds: how long it is.
        negative_prompt: what it does not show; None is the pipeline's own.
    """

    name: str
    prompt: Any
    seed: int
    seconds: float
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Settings:
    """What all videos of a batch share, as JSON takes it.

    Args:
        model: folder of the pipeline.
        stack: name of the memory; None is the model's own.
        options: of the memory.
        call: further arguments of the pipeline's call.
        fps: frames a second.
        scale: pixel frames of a latent frame.
        every: chunks between two checkpoints.
        dtype: of the model.
        device: where it runs.
    """

    model: str
    stack: str | None
    fps: float
    scale: int
    every: int
    dtype: str
    device: str
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def frames(self, video: Video) -> int:
        """Return the pixel frames of a video."""
        return video_frames(video.seconds, self.fps, self.scale)[0]


def read_videos(
    path: Path, seed: int, seconds: float | None, check: Callable[[Video], object] = lambda video: None
) -> list[Video]:
    """Return the videos of a file of JSON lines, e.g. `{"prompt": "a fox", "seed": 3}`; an empty line is none.

    The other keys are `name` (the number of the line, in four digits, unless given), `seconds` and `negative_prompt`.

    Args:
        path: the file.
        seed: of the lines that give none.
        seconds: of the lines that give none.
        check: raises `InvalidOptionError` for what is wrong with a video beside its line.

    Raises:
        InvalidOptionError: if it cannot be read, or a line is wrong; the message names the line.
    """
    videos: dict[int, Video] = {}
    for number, line in prompt_lines(path):
        try:
            videos[number] = _video(line, {"name": f"{number:04d}", "seed": seed, "seconds": seconds})
            check(videos[number])
        except InvalidOptionError as error:
            raise InvalidOptionError(f"{path}, line {number}: {error}") from error
    if not videos:
        raise InvalidOptionError(f'{path} holds no prompt; give lines such as {{"prompt": "a fox", "seed": 3}}')
    _require_apart(path, videos.items())
    return list(videos.values())


def _video(line: str, usual: Mapping[str, Any]) -> Video:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidOptionError(f"this is no JSON ({error})") from error
    if not isinstance(given, dict) or "prompt" not in given:
        raise InvalidOptionError('a line is an object with a prompt, e.g. {"prompt": "a fox"}')
    if unknown := sorted(set(given) - set(_KEYS)):
        raise InvalidOptionError(f"{', '.join(unknown)} is no key of a line; those are {', '.join(_KEYS)}")
    video = Video(**{**usual, **given})
    _check_prompt(video)
    if not is_name(video.name):
        raise InvalidOptionError(f"a name is of letters, digits, '_', '-' and '.', without .mp4, got {video.name!r}")
    require_seed(video.seed)
    if video.seconds is None:
        raise InvalidOptionError("it does not say its seconds; give them here, or --seconds for all lines")
    if isinstance(video.seconds, bool) or not isinstance(video.seconds, int | float):
        raise InvalidOptionError(f"seconds must be a number > 0, got {video.seconds!r}")
    return video


def is_name(name: object) -> bool:
    """Return whether a video may be called so: it is a file in the batch's folder."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _check_prompt(video: Video) -> None:
    schedule = isinstance(video.prompt, list)
    texts = [shot.prompt for shot in shots(video.prompt)] if schedule else [video.prompt]
    if not texts or not all(isinstance(each, str) for each in texts):
        raise InvalidOptionError(
            f'a prompt is a text, or a schedule [[0, "a"], [20, "b", "cut"]], got {video.prompt!r}'
        )
    if not isinstance(video.negative_prompt, str | None):
        raise InvalidOptionError(f"negative_prompt must be a text, got {video.negative_prompt!r}")


def _require_apart(path: Path, videos: Iterable[tuple[int, Video]]) -> None:
    """Raise `InvalidOptionError` if two lines are one video, or have one name, be it in other letters."""
    names: dict[Any, int] = {}
    for number, video in videos:
        asked = (json.dumps(video.prompt), video.seed, video.seconds, video.negative_prompt)
        for key, what in ((video.name.lower(), f"have the name {video.name}"), (asked, "ask for the same video")):
            if key in names:
                raise InvalidOptionError(f"{path}: lines {names[key]} and {number} {what}; change one of them")
            names[key] = number
