"""Decoding a chunk, and a video from its first chunk on for as long as time is left."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, one
from benchmarks.gpu.machine import Machine, milliseconds
from benchmarks.gpu.video import Size, Video, pipeline, vae
from benchmarks.report import Row, samples
from kvpack.adapters.wan.vae import StreamingDecoder

_FRAMES, _SPARE = 4, 5.0


def decoding(machine: Machine, rows: list[Row], size: Size, dtype: torch.dtype) -> None:
    """Append milliseconds of decoding four latent frames behind others, and the peak of it."""
    decode = StreamingDecoder(vae(size, machine.device, dtype), size.height, size.width)
    latents = torch.randn(1, 16, _FRAMES, size.height // 8, size.width // 8, device=machine.device, dtype=dtype)
    with torch.no_grad():
        decode(latents)
        machine.begin_peak()
        spent = machine.each(partial(decode, latents), size.times)
    peak, subject = machine.peak(), f"decode {_FRAMES} latent frames, {str(dtype).removeprefix('torch.')}"
    rows.append(samples(subject, "time", milliseconds(spent), "ms"))
    rows.append(samples(subject, "pixel frames a second", [4 * _FRAMES / each for each in spent], "fps"))
    if peak is not None:
        rows.append(one(subject, "peak allocated, all in all", peak.allocated, "bytes"))


def from_the_first_chunk(bench: Bench, machine: Machine, rows: list[Row], size: Size, model: Any, kind: str) -> str:
    """Append frames a second of a whole video of `packforcing`, which ends early if the time does."""
    video = Video(pipeline(model), machine, size, "packforcing")
    try:
        machine.begin_peak()
        taken: list[float] = []
        while len(taken) * 4 < size.frames and bench.left > _SPARE:
            taken.append(machine.seconds(video.chunk))
        held, seconds = video.session.stats()["resident_bytes"], sum(taken)
        subject, frames = f"packforcing, {kind}, from its first chunk on", 16 * len(taken)
        late = taken[len(taken) // 2 :]
        rows += [
            one(subject, "video", frames / 16, "s"),
            one(subject, "pixel frames a second, without decoding", frames / seconds, "fps"),
            samples(subject, "chunk, second half", milliseconds(late), "ms"),
            one(subject, "held at the end", held, "bytes"),
        ]
        peak = machine.peak()
        if peak is not None:
            rows.append(one(subject, "peak allocated", peak.allocated, "bytes"))
            rows.append(one(subject, "peak reserved", peak.reserved, "bytes"))
    finally:
        video.close()
    return "" if len(taken) * 4 >= size.frames else f"ended by the time after {len(taken)} chunks"
