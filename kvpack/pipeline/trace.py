"""What a memory does in a generation, chunk by chunk, as lines of JSON; read by `kvpack report`.

The first line tells of the generation, each other one of a chunk: which past frames some layers attend and where, bytes
by part, seconds by phase, how far the latents have drifted, and a small picture where frames are decoded as they come.
A line is bounded whatever the length of the video: neighbours are one range, and there are at most `LAYERS` layers.
"""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor

from kvpack.errors import OutputError
from kvpack.generation.chunks import GeneratedChunk
from kvpack.generation.run import Run
from kvpack.memory.layer import LayerCache
from kvpack.memory.session import Session
from kvpack.memory.stack_plan import StackPlan
from kvpack.version import __version__

#: Most layers that a trace tells of, spread evenly over the model.
LAYERS = 8
#: Most ranges of frames or positions of a layer; what is beyond is left out, and counted.
RANGES = 256
_PICTURE = 96  # pixels of the longer side


def traced(run: Run, path: Path | None) -> Iterator[GeneratedChunk]:
    """Yield a run's chunks, and write a line for each into a file, if one is given.

    Raises:
        OutputError: if the file cannot be written; nothing is generated then.
    """
    if path is None:
        yield from _measured(run)
        return
    try:
        if path.is_file() and not path.is_symlink():
            path.unlink()  # a stream that is still open may go on writing into the old file
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write the trace {path}: {error.strerror}; give trace() a file in a writable directory, or None"
        ) from error
    with file:
        trace = Trace(run, file, _frame=0 if run.position is None else run.position[1])
        run.watch = trace.look  # on the instance, in the place of the class's, which does nothing
        try:
            for chunk in _measured(run):
                trace.write(chunk)
                yield chunk
        finally:
            vars(run).pop("watch", None)  # the two hold each other


def _measured(run: Run) -> Iterator[GeneratedChunk]:
    """Yield a run's chunks; what drift is told from stays with it, which may be traced when it is resumed or forked."""
    for chunk in run.chunks():
        # Of every run, traced or not, since a fork of it may be traced.
        run.first_spread = run.first_spread or spread(chunk.latents)
        yield chunk


@dataclass
class Trace:
    """Writes the lines of one generation.

    Args:
        run: the generation.
        file: where to.
    """

    run: Run
    file: IO[str]
    seconds: dict[str, float] = field(default_factory=dict)
    _attended: list[dict[str, Any]] = field(default_factory=list)
    _frame: int = 0
    _begun: bool = False

    def look(self) -> None:
        """Read what the chunk in progress attends; called between its last denoising step and its commit."""
        session = next(iter(self.run.sessions.values()))
        self._attended = [attended(session, index) for index in layers(session.geometry.layers)]

    def write(self, chunk: GeneratedChunk) -> None:
        """Write a line for a chunk that is done."""
        if not self._begun:
            # Not in the beginning: sessions, which it tells of, are there from the first chunk on.
            self._line(self._head())
        self._begun = True
        stats = self.run.denoiser.stats()
        seconds, self.seconds = self.seconds, stats["seconds"]
        spent = {part: round(now - seconds.get(part, 0.0), 6) for part, now in stats["seconds"].items()}
        line = {"chunk": chunk.index, "first_frame": self._frame, "frames": chunk.latents.shape[2]}
        self._frame += chunk.latents.shape[2]
        picture = None if chunk.pixels is None else thumbnail(chunk.pixels)
        told = {
            "attended": self._attended,
            "bytes": held(stats, getattr(self.run.stack, "tier", "device")),
            "seconds": spent,
            **self._drift(chunk.latents),
        }
        self._line({**line, **told, "picture": picture})
        self._attended = []  # a chunk that was given is not looked at

    def _head(self) -> dict[str, Any]:
        session = next(iter(self.run.sessions.values()))
        geometry, name = session.geometry, self.run.stack.name
        prompt = self.run.call.get("prompt")
        return {
            "kvpack": __version__,
            "stack": name,
            "prompt": prompt if isinstance(prompt, str | None) else prompt[0],
            "seconds_a_frame": self.run.scale / self.run.fps,
            "layers": layers(geometry.layers),
            "tokens_per_frame": geometry.tokens_per_frame,
            "kv_bytes_per_token": geometry.kv_bytes_per_token,
        }

    def _drift(self, latents: Tensor) -> dict[str, float]:
        """Tell how far means and spreads of the latents' channels are from those of the first chunk, in its spreads."""
        assert self.run.first_spread is not None
        means, spreads, first_means, unit = (each.float().cpu() for each in (*spread(latents), *self.run.first_spread))
        unit = unit.clamp(min=1e-6)  # a channel may be constant, as that of zeros
        drift = ((means - first_means) / unit).square().mean().sqrt()
        return {"drift": round(float(drift), 6), "contrast": round(float((spreads / unit).mean()), 6)}

    def _line(self, data: dict[str, Any]) -> None:
        self.file.write(json.dumps(data, separators=(",", ":")) + "\n")
        self.file.flush()  # a trace is read while the video is made, and after a crash


def spread(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of latents, `[batch, channels, frames, height, width]`."""
    return latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))


def layers(count: int) -> list[int]:
    """Return the layers that a trace tells of.

    >>> layers(3), layers(30)
    ([0, 1, 2], [0, 4, 8, 12, 17, 21, 25, 29])
    """
    if count <= LAYERS:
        return list(range(count))
    return [round(index * (count - 1) / (LAYERS - 1)) for index in range(LAYERS)]


def held(stats: dict[str, Any], tier: str) -> dict[str, int]:
    """Return the bytes of a run by part; together they are what is resident, and an archive that lies elsewhere."""
    parts = {
        "attended": stats["attended_bytes"],
        "archive": stats["archive_bytes"],
        "workspace": stats["workspace_bytes"],
    }
    elsewhere = 0 if tier == "device" else parts["archive"]
    return {**parts, "room": max(0, stats["resident_bytes"] + elsewhere - sum(parts.values()))}


def attended(session: Session, layer: int) -> dict[str, Any]:
    """Return what a layer attends in the chunk in progress, of the first row.

    `frames` are ranges of the past, [first, frames, part], of a stack; other memories keep tokens that belong to no
    frame. `positions` are ranges of temporal positions, [start, length], and `chunk_start` is that of the chunk.
    """
    cache, plan = session.caches[layer], session.plan
    found: dict[str, Any] = {"layer": layer, "tokens": cache.lengths[0] if cache.lengths else 0}
    if cache.attended is None:
        return found
    if isinstance(plan, StackPlan):
        pieces = _pieces(plan, cache)
        found["frames"], found["left_out"] = pieces[:RANGES], max(0, len(pieces) - RANGES)
    start = torch.as_tensor(cache.attended.chunk_start).flatten()[0]
    return {**found, "positions": _positions(cache)[:RANGES], "chunk_start": round(float(start), 3)}


def _pieces(plan: StackPlan, cache: LayerCache) -> list[tuple[int, int, str]]:
    chosen = range(len(plan.mid)) if cache.selected is None else cache.selected[0].tolist()  # None: all of them
    blocks = {
        "sink": [plan.ledger.whole[index] for index in plan.sink],
        "mid": [plan.mid[index] for index in chosen],
        "recent": [plan.ledger.whole[index] for index in plan.recent],
    }
    ranges: list[tuple[int, int, str]] = []
    for part, those in blocks.items():
        for block in sorted(those, key=lambda each: each.first_frame):
            first, frames = block.first_frame, block.frames
            if ranges and ranges[-1][2] == part and sum(ranges[-1][:2]) == first:
                first, frames = ranges[-1][0], ranges.pop()[1] + frames
            ranges.append((first, frames, part))
    return ranges


def _positions(cache: LayerCache) -> list[tuple[float, float]]:
    """Return ranges of the temporal positions that tokens are attended at; those closer than a frame are one."""
    held = [leaf.attended.tokens for leaf in cache.leaves if leaf.attended is not None]
    mine = [each for tokens in held for each in (tokens if isinstance(tokens, tuple) else tokens[0])]
    times = [each.coordinates[0, ..., 0].flatten() for each in mine]
    ranges: list[tuple[float, float]] = []
    for time in torch.cat(times).unique().tolist() if times else []:
        if ranges and time - sum(ranges[-1]) <= 1.0:
            ranges[-1] = (ranges[-1][0], round(time - ranges[-1][0], 3))
        else:
            ranges.append((round(time, 3), 0.0))
    return ranges


def thumbnail(pixels: Tensor) -> str:
    """Return the first frame of a chunk, `[batch, channels, frames, height, width]` in [-1, 1], as a small data URL."""
    frame = pixels[0, :3, 0].float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    picture, data = Image.fromarray(frame), BytesIO()
    picture.thumbnail((_PICTURE, _PICTURE))
    picture.save(data, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
