"""A folder of training clips: videos, which are encoded once, or latents that are encoded already."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from kvpack.checkpoints.text import read_lines
from kvpack.errors import BrokenClipError, InvalidOptionError
from kvpack.generation.trainee import Trainee
from kvpack.media.files import save_bytes
from kvpack.media.pixels import video_pixels

Broken = Literal["stop", "skip"]
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
LATENTS = ".safetensors"
_MEGABYTE = 1 << 20


@dataclass(frozen=True, eq=False)
class Clip:
    """Latents of a clip and embeddings of its caption.

    Args:
        name: of the file, and of the row in it.
        latents: normalised latents.
        embeds: embeddings of its caption.
    """

    name: str
    latents: Float[Tensor, "channels frames height width"]
    embeds: Float[Tensor, "tokens width"]


@dataclass(frozen=True)
class _Row:
    """Where a clip is: the file that was given, that of its latents, and the row in it; and what it is."""

    given: Path
    file: Path
    index: int
    caption: str
    shape: tuple[int, ...]
    digest: str

    @property
    def name(self) -> str:
        return f"{self.given.name}[{self.index}]"


class ClipFolder(Sequence[Clip]):
    """Clips of one size, that of most of them, cut to one length, in the order of their files' names.

    A `.safetensors` file has `latents` `[clips, channels, frames, height, width]`, normalised as the pipeline does. Of
    a video (`.mp4`, `.mov`, `.mkv`, `.webm`, `.avi`) the first frames are encoded, once, into a file in `cache`.
    Captions are the lines of a `.txt` file of the same name, one for each clip.

    Args:
        folder: the folder.
        trainee: encodes videos and captions.
        frames: latent frames of a clip; longer ones are cut.
        channels: latent channels of the model.
        size: height and width in pixels that videos are scaled and cropped to, and that latents must have; None leaves
            them.
        fps: frames a second that the model was trained with; of videos with more, some are left out.
        cache: folder of encoded videos, another than that of the clips, made where there is none; without one no video
            is taken.
        encoder: what tells the VAE from others, whose encoded videos are not taken for its own.
        broken: whether a clip that cannot be used is left out, or stops everything; `skipped` says which are and why.
        device: where latents go.

    Raises:
        BrokenClipError: if a clip cannot be used and `broken` is "stop", or if none can.
        InvalidOptionError: if there is no such folder, or none for what is encoded.
    """

    def __init__(
        self,
        folder: Path,
        trainee: Trainee,
        frames: int,
        channels: int,
        *,
        size: tuple[int, int] | None = None,
        fps: float = 16.0,
        cache: Path | None = None,
        encoder: str = "",
        broken: Broken = "stop",
        device: torch.device | str = "cpu",
    ) -> None:
        if not folder.is_dir():
            raise InvalidOptionError(f"no data folder {folder}; give a folder of videos or of latents")
        self.trainee, self.frames, self.channels, self.size, self.fps = trainee, frames, channels, size, fps
        self.folder, self.cache, self.encoder, self.device = folder, cache, encoder, device
        self.skipped: list[str] = []
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (*VIDEOS, LATENTS))
        found = [row for file in tqdm(files, desc="clips", leave=False) for row in self._usable(file, broken)]
        self._rows = list(self._of_one_size(found, broken))
        if not self._rows:
            kinds = ", ".join((*VIDEOS, LATENTS))
            told = f"; left out: {'; '.join(self.skipped)}" if self.skipped else ""
            raise BrokenClipError(f"{folder} holds no usable clip; it needs {kinds} with captions in .txt{told}")
        captions = sorted({row.caption for row in self._rows})
        # On the host: there may be more of them than a device has room for, and a batch needs its own.
        each_once = tqdm(captions, desc="text", leave=False)
        self._embeds = {caption: trainee.embed([caption])[0].cpu() for caption in each_once}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        row = self._rows[index]
        latents = self._read(row.file, row.index).float().to(self.device)
        return Clip(row.name, latents, self._embeds[row.caption].to(self.device))

    def fingerprint(self) -> str:
        """Return a hash of names, captions and latents, by which a resumed run checks that it has the same clips."""
        told = json.dumps([[row.name, row.caption, row.digest, *row.shape] for row in self._rows])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def _usable(self, file: Path, broken: Broken) -> Iterator[_Row]:
        try:
            source = file if file.suffix.lower() == LATENTS else self._encoded(file)
            captions = _captions(file)
            with _opened(source) as opened:
                shape = opened.get_slice("latents").get_shape()
            if len(shape) != 5:
                raise BrokenClipError(f"latents must be [clips, channels, frames, height, width], got {shape}")
            if len(captions) != shape[0]:
                counts = f"{len(captions)} captions for {shape[0]} clips"
                raise BrokenClipError(f"{file.with_suffix('.txt').name} has {counts}")
        except BrokenClipError as error:
            self._report(f"{file.name}: {error}", broken)
            return
        for index, caption in enumerate(captions):
            try:
                latents = self._read(source, index)
                self._check(latents)
            except BrokenClipError as error:
                self._report(f"{file.name}, clip {index}: {error}", broken)
            else:
                # Bytes, for NumPy has no bfloat16.
                digest = hashlib.sha256(latents.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
                yield _Row(file, source, index, caption, tuple(latents.shape), digest)

    def _of_one_size(self, rows: Sequence[_Row], broken: Broken) -> Iterator[_Row]:
        sizes = Counter(row.shape[2:] for row in rows)
        if self.size is None:
            (wanted, _), *_ = sizes.most_common(1) or [((), 0)]
            why = "those of most clips are"
        else:
            wanted = tuple(side // self.trainee.spatial_scale for side in self.size)
            why = f"a height and width of {self.size[0]}x{self.size[1]} pixels ask for"
        for row in rows:
            if row.shape[2:] == wanted:
                yield row
            else:
                has, asked = (f"{size[0]}x{size[1]}" for size in (row.shape[2:], wanted))
                self._report(f"{row.given.name}, clip {row.index}: its latents are {has}, but {why} {asked}", broken)

    def _report(self, what: str, broken: Broken) -> None:
        if broken == "stop":
            raise BrokenClipError(f"{what}. Mend it or take it out, or let broken clips be skipped")
        self.skipped.append(what)

    def _read(self, source: Path, index: int) -> Tensor:
        with _opened(source) as file:
            latents: Tensor = file.get_slice("latents")[index]
        return latents[:, : self.frames]

    def _check(self, latents: Tensor) -> None:
        channels, frames, *_ = latents.shape
        if channels != self.channels:
            raise BrokenClipError(f"it has {channels} latent channels, but the model has {self.channels}")
        if frames < self.frames:
            raise BrokenClipError(f"it has {frames} latent frames, but {self.frames} are needed")
        if not bool(latents.isfinite().all()):
            raise BrokenClipError("its latents hold NaN or infinity")

    def _encoded(self, file: Path) -> Path:
        # In the clips' own folder the encoded ones would be taken for further clips.
        if self.cache is None or self.cache.resolve() == self.folder.resolve():
            raise InvalidOptionError(f"{file.name} is a video; give cache, a folder of its own for what is encoded")
        # All that the latents follow from: a clip is encoded anew where one of these is another.
        wanted = f"{_digest(file)}-{self.frames}-{self.size}-{self.fps}-{self.encoder}"
        path = self.cache / f"{file.stem}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}{LATENTS}"
        if not path.exists():
            pixels = _pixels(file, self.trainee.temporal_scale * (self.frames - 1) + 1, self.size, self.fps)
            latents = self.trainee.encode(pixels[None])
            self.cache.mkdir(parents=True, exist_ok=True)
            save_bytes(save({"latents": latents.float().cpu().contiguous()}), path)
        return path


def _digest(path: Path) -> str:
    """Return a hash of a file's size, and of its first and last megabyte: videos are large, and dates tell nothing."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for start in (0, max(0, size - _MEGABYTE)):
                file.seek(start)
                digest.update(file.read(_MEGABYTE))
    except OSError as error:
        raise BrokenClipError(f"{path.name} cannot be read: {error}") from error
    return digest.hexdigest()


def _captions(file: Path) -> list[str]:
    path = file.with_suffix(".txt")
    try:
        return read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenClipError(f"no captions can be read from {path.name}: {error}") from error


def _opened(path: Path) -> Any:
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise BrokenClipError(f"{path.name} cannot be read: {error}") from error
    if "latents" not in file.keys():  # noqa: SIM118  # not a mapping
        raise BrokenClipError(f"{path.name} has no tensor named latents; it has {', '.join(file.keys())}")
    return file


def _pixels(path: Path, frames: int, size: tuple[int, int] | None, fps: float) -> Tensor:
    """Read the first frames of a video in [-1, 1], at `fps`, scaled to cover `size` and cropped at its centre."""
    try:
        height, width = size or (None, None)
        pixels = video_pixels(path, height, width, fps, first=frames)[0]
    except InvalidOptionError as error:
        raise BrokenClipError(str(error)) from error
    if len(pixels) < frames:
        raise BrokenClipError(f"it has {len(pixels)} frames at {fps:g} frames a second, but {frames} are needed")
    return 2 * pixels.transpose(0, 1) - 1
