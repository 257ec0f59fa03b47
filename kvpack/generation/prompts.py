"""Prompts that change while a video is generated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from kvpack.errors import InvalidOptionError
from kvpack.logging import get_logger

logger = get_logger(__name__)

#: A text, one for each video of a batch, or text embeddings `[batch, tokens, width]`.
Prompt = str | list[str] | Tensor
#: Thirty years.
_MOST_SECONDS = 1e9
_FORM = '[(0, "a ..."), (20, "then ..."), (40, "elsewhere ...", "cut")]'


@dataclass(frozen=True)
class Shot:
    """A prompt and when it begins.

    Args:
        seconds: of the video, where it begins.
        prompt: what the model is told; None if the call has none.
        cut: whether it is another scene.
    """

    seconds: float
    prompt: Prompt | None
    cut: bool = False

    def chunk(self, fps: float, chunk_frames: int, temporal_scale: int, first_frames: int | None = None) -> int:
        """Return the chunk whose beginning is nearest; a video's first latent frame stands for one pixel frame.

        Args:
            fps: pixel frames a second.
            chunk_frames: latent frames of a chunk.
            temporal_scale: pixel frames of a latent frame.
            first_frames: latent frames of the first chunk, if it is shorter.

        >>> [Shot(seconds, "").chunk(16.0, 4, 4) for seconds in (0, 5, 20)]
        [0, 5, 20]
        """
        if not self.seconds:  # 0 would round up to chunk 1 where a chunk is one latent frame
            return 0
        # As if the first latent frame stood for as many pixel frames as the rest, and the first chunk were whole.
        frames = (self.seconds * fps + temporal_scale - 1) / temporal_scale
        return max(0, round((frames + chunk_frames - (first_frames or chunk_frames)) / chunk_frames))


def shots(prompt: Any) -> list[Shot]:
    """Return the shots of a prompt, which is one for the whole video or a schedule of them.

    An entry is a tuple, or a list as JSON has it; no batch of prompts has lists in it.

    Raises:
        InvalidOptionError: if it is meant as a schedule, but is none.

    >>> [shot.seconds for shot in shots([(0, "a fox"), (20, "then it rests", "cut")])]
    [0.0, 20.0]
    """
    # A list of texts alone is a batch.
    if not isinstance(prompt, list) or not any(isinstance(entry, tuple | list) for entry in prompt):
        return [Shot(0.0, prompt)]
    schedule = [_shot(entry) for entry in prompt]
    if schedule[0].seconds != 0:
        raise InvalidOptionError(f"a prompt schedule begins at 0 seconds, got {schedule[0].seconds:g}; e.g. {_FORM}")
    for before, after in pairwise(schedule):
        if after.seconds <= before.seconds:
            raise InvalidOptionError(
                f"the seconds of a prompt schedule ascend, got {after.seconds:g} behind {before.seconds:g}"
            )
    batches = {1 if isinstance(shot.prompt, str | None) else len(shot.prompt) for shot in schedule}
    if len(batches) > 1:
        raise InvalidOptionError(f"all prompts of a schedule are of one batch, got batches of {sorted(batches)}")
    return schedule


def scheduled(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[Shot]]:
    """Return the arguments of a call with the first prompt in them alone, and all shots; embeddings go by their name.

    Raises:
        InvalidOptionError: if the prompt is meant as a schedule, but is none.
    """
    embeds = arguments["prompt"] is None and "prompt_embeds" in arguments
    schedule = shots(arguments["prompt_embeds" if embeds else "prompt"])
    first = schedule[0].prompt
    # Embeddings in `prompt` go by the name that the stock call knows them by, where it has one that is free.
    if embeds or (isinstance(first, Tensor) and arguments.get("prompt_embeds", first) is None):
        return {**arguments, "prompt": None, "prompt_embeds": first}, schedule
    return {**arguments, "prompt": first}, schedule


def warn_of_late(schedule: Sequence[Shot], chunks: Sequence[int], count: int | None) -> None:
    """Log which prompts are never used, since the video has ended before.

    Args:
        schedule: prompts of a video.
        chunks: at which chunk each begins.
        count: chunks of the video; None if it is endless.
    """
    for shot, chunk in zip(schedule, chunks, strict=True):
        if count is not None and chunk >= count:
            logger.warning("the prompt for second %g and later is not used, for the video ends before", shot.seconds)


def _shot(entry: Any) -> Shot:
    if not isinstance(entry, tuple | list) or len(entry) not in (2, 3):
        raise InvalidOptionError(f"an entry of a prompt schedule is (seconds, prompt), got {entry!r}; e.g. {_FORM}")
    seconds, prompt, *cut = entry
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 <= seconds < _MOST_SECONDS:
        given = repr(seconds)[:80]
        raise InvalidOptionError(f"a prompt schedule begins its prompts at seconds >= 0, got {given}; e.g. {_FORM}")
    texts = prompt if isinstance(prompt, list) else [prompt]
    embedded = isinstance(prompt, Tensor) and prompt.ndim == 3
    if not embedded and (not texts or not all(isinstance(text, str) for text in texts)):
        given = f"a tensor {tuple(prompt.shape)}" if isinstance(prompt, Tensor) else repr(prompt)
        raise InvalidOptionError(
            f"a prompt is a text, a list of texts for a batch, or embeddings [batch, tokens, width], got {given}"
        )
    if cut not in ([], ["cut"]):
        raise InvalidOptionError(f'the third part of an entry is "cut" or not there, got {cut[0]!r}; e.g. {_FORM}')
    return Shot(float(seconds), prompt, bool(cut))
