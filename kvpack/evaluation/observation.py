"""What was seen of a video: a few numbers a frame, from which every measure is computed."""

import zipfile
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import InvalidOptionError
from kvpack.evaluation.facts import Mask, Values
from kvpack.media.files import save_bytes

REFERENCE_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class Observation:
    """Per-frame statistics of a video of T frames; lengths are in frame heights, colours in 0..1.

    Args:
        fps: frames a second.
        centre: (x, y) of the subject, [T, 2]; NaN where it isn't visible.
        area: of the subject, [T]; NaN where it isn't visible.
        colour: of the subject, [T, 3]; NaN where it isn't visible.
        form: of the subject at its own centre and scale, [T, 16, 16], 255 where it is.
        background: thumbnails without the subject and the landmarks' light, [T, 3, r, c]; NaN where the subject is.
        flicker: mean |difference| from the background before, [T]; NaN in the first frame.
        checks: whether colour, shape and background are the named ones, [T, 3] as 0 or 1; NaN where none is named.
        landmark_on: which landmarks are on, [T, n].
        landmark_colour: their colours, [T, n, 3].
        flow: speed of optical flow in frame heights a second, [p]; empty where a subject was tracked.
        flow_frame: the frame of each, [p].
    """

    fps: float
    centre: Values
    area: Values
    colour: Values
    form: NDArray[np.uint8]
    background: NDArray[np.float16]
    flicker: Values
    checks: Values
    landmark_on: Mask
    landmark_colour: Values
    flow: Values
    flow_frame: NDArray[np.int64]

    @property
    def frames(self) -> int:
        """Number of frames of the video."""
        return len(self.area)

    @property
    def reference_frames(self) -> int:
        """Number of frames in the first five seconds, to which all others are compared."""
        return min(self.frames, max(1, round(REFERENCE_SECONDS * self.fps)))

    @property
    def visible(self) -> Mask:
        """Whether the subject is visible, [T]."""
        return np.isfinite(self.area)

    def save(self, path: Path) -> None:
        """Write it as .npz, whole or not at all.

        Raises:
            OutputError: if it can't be written.
        """
        buffer = BytesIO()
        arrays: dict[str, Any] = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        save_bytes(buffer.getvalue(), path)

    @classmethod
    def load(cls, path: Path) -> "Observation":
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            InvalidOptionError: if the file isn't one of an observation.
            OSError: if it can't be read.
        """
        try:
            with np.load(path, allow_pickle=False) as found:
                arrays = {field.name: found[field.name] for field in fields(cls)}
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InvalidOptionError(f"{path} must be an observation that save() wrote: {error}") from error
        return cls(**{**arrays, "fps": float(arrays["fps"])})
