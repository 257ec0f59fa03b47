"""Pictures and clips of any kind as RGB values in 0..1: upright, scaled to cover a size and cropped at its centre."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from kvpack.errors import InvalidOptionError, NonFiniteLatentsError
from kvpack.media.reading import is_picture, read_clip, read_picture
from kvpack.media.video import FrameRate

Size = tuple[int, int]
#: Largest values of the integers that pictures are stored in.
_LARGEST = {torch.uint8: 255, torch.uint16: 65535}
#: How far beyond its range resampling and half precision may bring a value.
_SLACK = 1e-2
_LAYOUT = "arrays are [..., height, width, channels], tensors [..., channels, height, width], of 1 to 4 channels"


def image_pixels(
    image: Any, height: int | None = None, width: int | None = None
) -> Float[Tensor, "batch 3 height width"]:
    """Read pictures: one, or a list or a batch of them.

    Args:
        image: a PIL picture of any mode, a path, an array [(batch,) H, W, channels] or a tensor
            [(batch,) channels, H, W], or a list of such. Values of floats lie in 0..1, or in -1..1 if some are below 0;
            those of uint8 in 0..255, and those of uint16 in 0..65535. Transparency is left out.
        height: pixels to scale and crop to; with None all pictures must have one size.
        width: the same.

    Raises:
        InvalidOptionError: if it is nothing of the kind.
        NonFiniteLatentsError: if it holds NaN or infinity.
    """
    pictures = list(image) if isinstance(image, list | tuple) else [image]
    return _stacked("image", pictures, height, width)


def video_pixels(
    video: Any,
    height: int | None = None,
    width: int | None = None,
    fps: FrameRate | None = None,
    source_fps: FrameRate | None = None,
    *,
    first: int | None = None,
    last: int | None = None,
) -> Float[Tensor, "batch frames 3 height width"]:
    """Read clips: one, or a list or a batch of them.

    Args:
        video: a path, a list of pictures (see `image_pixels`), an array [(batch,) frames, H, W, channels] or a tensor
            [(batch,) frames, channels, H, W], or a list of such clips.
        height: pixels to scale and crop to; with None all pictures must have one size.
        width: the same.
        fps: frames a second that are wanted; None is the clip's own.
        source_fps: frames a second of a clip that is no file; None is `fps`.
        first: frames after which reading ends; None is all.
        last: frames, the last of each clip, that are wanted; None is all.

    Raises:
        InvalidOptionError: if it is nothing of the kind, if a clip is empty, or if clips differ in length.
        NonFiniteLatentsError: if it holds NaN or infinity.
    """
    read = partial(_frames, fps=fps, source_fps=source_fps, first=first, last=last)
    clips = [_stacked("video", read(clip), height, width) for clip in _clips(video)]
    lengths = sorted({len(clip) for clip in clips})
    if len(lengths) > 1:
        raise InvalidOptionError(f"clips of a batch must have one length, got {' and '.join(map(str, lengths))} frames")
    return torch.stack(clips)


def covered(pixels: Float[Tensor, "frames channels h w"], size: Size) -> Float[Tensor, "frames channels height width"]:
    """Scale pictures until they cover a size (height, width), and crop them at their centre."""
    height, width = pixels.shape[-2:]
    if (height, width) == size:
        return pixels
    ratio = max(size[0] / height, size[1] / width)
    # Rounding must not leave a row uncovered.
    scaled = [max(size[0], round(height * ratio)), max(size[1], round(width * ratio))]
    pixels = interpolate(pixels, scaled, mode="bilinear", antialias=True)  # else shrinking would skip rows
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return pixels[..., top : top + size[0], left : left + size[1]]


def _clips(video: Any) -> list[Any]:
    if isinstance(video, np.ndarray | Tensor):
        if video.ndim not in (4, 5):
            raise InvalidOptionError(f"video must be frames of pictures, got the shape {list(video.shape)}; {_LAYOUT}")
        return list(video) if video.ndim == 5 else [video]
    if isinstance(video, str | Path) and Path(video).is_file() and is_picture(Path(video)):
        return [[video]]  # libav would read it too, but not its EXIF
    if not isinstance(video, list | tuple):
        return [video]
    if not len(video):
        raise InvalidOptionError("video must have frames, got an empty list; give pictures, e.g. 1 + 4m of them")
    first = video[0]
    if isinstance(first, str | Path):
        return [video] if is_picture(Path(first)) else list(video)
    several = isinstance(first, list | tuple) or getattr(first, "ndim", 0) > 3
    return [clip for each in video for clip in _clips(each)] if several else [video]


def _frames(
    clip: Any, fps: FrameRate | None, source_fps: FrameRate | None, first: int | None, last: int | None
) -> Iterable[Any]:
    if isinstance(clip, str | Path):
        return read_clip(Path(clip), fps, first=first, last=last)
    if not isinstance(clip, list | tuple | np.ndarray | Tensor):
        raise InvalidOptionError(
            f"video must be a path, a list of pictures, an array or a tensor, got {type(clip).__name__}"
        )
    if fps is not None and source_fps is not None and fps != source_fps:
        # As `VideoFile.at`: to half a frame behind the last.
        count = int((len(clip) - 0.5) * fps / source_fps + 1e-6) + 1
        clip = [clip[min(len(clip) - 1, round(index * source_fps / fps))] for index in range(count)]
    return clip[:first] if last is None else clip[:first][-last:]


def _stacked(name: str, pictures: Iterable[Any], height: int | None, width: int | None) -> Tensor:
    """Return pictures [batch, 3, height, width]."""
    parts = []
    for each in pictures:
        values = _channels_first(name, each)
        size = height or values.shape[-2], width or values.shape[-1]
        parts.append(_small(values, size))
    if not parts:
        raise InvalidOptionError(f"{name} must hold pictures, got none")
    sizes = sorted({tuple(part.shape[-2:]) for part in parts})
    if len(sizes) > 1:
        raise InvalidOptionError(f"pictures of {name} must have one size, got {sizes[0]} and {sizes[-1]}")
    if len({part.dtype for part in parts}) == 1:
        parts = [torch.cat(parts)]  # before they are floats, of which there is one copy then
    return torch.cat(_unit_range(name, parts)) if len(parts) > 1 else _unit_range(name, parts)[0]


def _small(values: Tensor, size: Size) -> Tensor:
    """Return pictures in a size; bytes stay bytes, for a clip may be long."""
    if tuple(values.shape[-2:]) == size:
        return values
    scaled = covered(values.float(), size)
    return scaled if values.is_floating_point() else scaled.round().to(values.dtype)


def _channels_first(name: str, picture: Any) -> Tensor:
    """Return RGB values [pictures, 3, height, width] in the numbers that they came in."""
    if isinstance(picture, str | Path):
        picture = read_picture(Path(picture))
    if isinstance(picture, Image.Image):
        picture = _upright(picture)
    if isinstance(picture, np.ndarray):
        native = picture.astype(picture.dtype.newbyteorder("="), copy=False)  # torch takes no other byte order
        values = _tensor(name, native)
        values = values[..., None] if values.ndim == 2 else values
        values = values.movedim(-1, -3)  # [..., channels, height, width]
    elif isinstance(picture, Tensor):
        values = picture[None] if picture.ndim == 2 else picture
    else:
        raise InvalidOptionError(f"{name} must hold PIL pictures, arrays or tensors, got {type(picture).__name__}")
    if values.ndim not in (3, 4) or values.shape[-3] not in (1, 2, 3, 4) or 0 in values.shape:
        raise InvalidOptionError(f"{name} must hold pictures, got the shape {list(picture.shape)}; {_LAYOUT}")
    if values.dtype == torch.bool:
        values = values.to(torch.uint8) * 255
    if not (values.is_floating_point() or values.dtype in _LARGEST):
        raise InvalidOptionError(f"{name} must hold floats in 0..1, uint8 or uint16, got {picture.dtype}")
    grey = values.shape[-3] < 3
    values = values[..., :1, :, :].expand(*values.shape[:-3], 3, -1, -1) if grey else values[..., :3, :, :]
    return values if values.ndim == 4 else values[None]


def _tensor(name: str, array: Any) -> Tensor:
    try:
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # torch warns of what is read-only
    except TypeError as error:
        raise InvalidOptionError(f"{name} must hold floats in 0..1, uint8 or uint16, got {array.dtype}") from error


def _upright(picture: Image.Image) -> NDArray[Any]:
    """Return a PIL picture's values as its EXIF orientation turns it; deep ones keep their depth."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        return np.asarray(picture)
    if picture.mode in ("I", "F"):
        return _deep(np.asarray(picture))
    try:
        return np.asarray(picture.convert("RGB"))
    except ValueError as error:
        raise InvalidOptionError(f"a picture of mode {picture.mode} cannot be made RGB; convert it to RGB") from error


def _deep(values: NDArray[Any]) -> NDArray[Any]:
    """Return values of the modes I and F, which may count to 255 as well as to 65535, in the depth that they need."""
    high = values.max()
    if values.dtype.kind == "f" and (high <= 1 + _SLACK or not np.isfinite(high)):
        return values
    if values.min() < 0 or high > 65535:
        raise InvalidOptionError(f"a picture's values must lie in 0..65535, got {values.min()} to {high}")
    largest = 255 if high <= 255 else 65535
    return values / largest if values.dtype.kind == "f" else values.astype(np.uint8 if largest == 255 else np.uint16)


def _unit_range(name: str, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return values in 0..1; floats are in -1..1 if any of them is below 0."""
    floats = [part for part in parts if part.is_floating_point()]
    if not all(bool(part.isfinite().all()) for part in floats):
        raise NonFiniteLatentsError(f"{name} holds NaN or infinity; give finite pixels")
    low = min((float(part.min()) for part in floats), default=0.0)
    high = max((float(part.max()) for part in floats), default=1.0)
    signed = low < -_SLACK
    if low < -1 - _SLACK or high > 1 + _SLACK:
        raise InvalidOptionError(
            f"floats of {name} must lie in 0..1 or in -1..1, got {low:.4g} to {high:.4g}; "
            "divide them by 255, or give uint8"
        )
    return [_unit(part, signed) for part in parts]


def _unit(values: Tensor, signed: bool) -> Tensor:
    if not values.is_floating_point():
        return values.float().div_(_LARGEST[values.dtype])
    values = values.float()
    return (values / 2 + 0.5 if signed else values).clamp(0, 1)
