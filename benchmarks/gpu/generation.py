"""What a chunk of a long video takes, by phase, beside the bare transformer, and what it holds beside the plan."""

from __future__ import annotations

from functools import cache, partial
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.bench import one
from benchmarks.gpu.machine import Machine, milliseconds
from benchmarks.gpu.video import STEPS, Size, Video, pipeline
from benchmarks.report import Row, samples
from kvpack.planning.fit import fit
from kvpack.planning.planner import plan
from kvpack.planning.resident import passing, resident

CHUNK, BARE, OVERHEAD = "chunk", "forward, keys in place", "chunk over the bare transformer - 1"
WAITS = "waits for the device in all denoising steps of a chunk"
#: Only `text_encoder_config` of a model that is not measured.
_NO_TEXT = {
    "model_type": "umt5",
    "vocab_size": 2,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_layers": 1,
    "num_heads": 2,
}


def measured(
    rows: list[Row], model: Any, machine: Machine, size: Size, name: str, stack: str, options: dict[str, Any]
) -> None:
    """Append the figures of one memory behind `size.frames` latent frames.

    Args:
        rows: what is measured so far.
        model: the transformer, compiled or not.
        machine: where it runs.
        size: of the video.
        name: what the memory is called in the rows.
        stack: its name.
        options: its options.
    """
    video = Video(pipeline(model), machine, size, stack, options)
    try:
        rows.append(one(name, "filling the memory, no part of a video", machine.seconds(video.fill), "s"))
        machine.begin_peak()
        _chunks(rows, video, name)
        _memory(rows, video, name)
        _beside_bare(rows, video, name)
    finally:
        video.close()


def _chunks(rows: list[Row], video: Video, name: str) -> None:
    """Append milliseconds of chunks of the stream by phase, and frames a second."""
    video.chunk()
    mallocs = video.machine.counter("num_device_alloc")
    taken = [video.parts() for _ in range(video.size.times)]
    frames = 4 * video.frames
    rows.append(samples(name, CHUNK, milliseconds([whole for whole, _ in taken]), "ms"))
    rows += [
        samples(name, f"chunk: {part}", milliseconds([parts[part] for _, parts in taken]), "ms") for part in taken[0][1]
    ]
    rows.append(samples(name, "pixel frames a second, without decoding", [frames / whole for whole, _ in taken], "fps"))
    later = video.machine.counter("num_device_alloc")
    if mallocs is not None and later is not None:
        rows.append(one(name, "calls of cudaMalloc in these chunks", later - mallocs, "calls"))


def _memory(rows: list[Row], video: Video, name: str) -> None:
    """Append bytes that are held and the peak of a chunk, beside the plan's."""
    pipe, session, size = video.pipe, video.session, video.size
    configs = video.pipe._kvpack.adapter.configs(pipe)
    planned = plan(
        session.geometry,
        session.stack,
        session.frames,
        flops=partial(video.pipe._kvpack.adapter.forward_flops, configs),
        steps=STEPS,
    )
    held, chunks = session.stats()["resident_bytes"], session.past.book.chunks
    # Of a stream, whose length nobody knows.
    kept = resident(session.geometry, session.stack, chunks, batch=1).bytes(session.geometry.layers)
    rows += [
        one(name, "keys attended by a chunk", planned.attended_tokens, "tokens"),
        one(name, "held: stats()['resident_bytes']", held, "bytes"),
        one(name, "held, as planned", kept, "bytes"),
        one(name, "operations of a chunk, as planned", planned.flops_per_chunk, "FLOP"),
    ]
    peak = video.machine.peak()
    weights = sum(each.nbytes for each in pipe.transformer.parameters())
    # Keys and values of the prompt are kept for the length of a chunk.
    prompt = size.text * session.geometry.kv_bytes_per_token
    copies, own = passing(session.geometry, session.stack, rows=1, steps=STEPS)
    denoising = _denoising_bytes(size, session.geometry.dtype, video.frames)
    expected = weights + copies * kept + own + prompt + denoising
    rows.append(one(name, "peak, as planned: weights, memory, a forward", expected, "bytes"))
    if peak is not None:
        rows += [
            one(name, "peak allocated", peak.allocated, "bytes"),
            one(name, "peak reserved", peak.reserved, "bytes"),
            one(name, "peak allocated / planned", peak.allocated / expected, "ratio"),
        ]


@cache
def _denoising_bytes(size: Size, dtype: torch.dtype, frames: int) -> int:
    """Return the bytes of a forward's activations, which are the same for all memories."""
    configs = {"transformer": {"in_channels": 16, **size.transformer}, "vae": size.vae}
    return fit(configs, _NO_TEXT, (size.height, size.width), dtype, chunk_frames=frames, rows=1).denoising


def _beside_bare(rows: list[Row], video: Video, name: str) -> None:
    """Append forwards through kvpack and those of the bare transformer with the same number of keys in place."""
    machine, steps = video.machine, range(STEPS)
    own: list[float] = []
    spent: dict[str, list[float]] = {"step 0": [], "later steps": [], "commit": []}
    with torch.no_grad():
        held = video.held()
        for turn in range(video.size.times + 1):
            with video.bare(held):
                bare = machine.each(partial(video.denoise, 1), 2, warm=0)
            with video.denoiser.seam():
                through = [machine.seconds(partial(video.denoise, step)) for step in steps]
                commit = machine.seconds(video.commit)
            if turn:
                own += bare
                spent["step 0"].append(through[0])
                spent["later steps"] += through[1:]
                spent["commit"].append(commit)
        if machine.cuda:
            with video.denoiser.seam():
                waits = machine.waits(lambda: [video.denoise(step) for step in steps])
            rows.append(one(name, WAITS, waits, "waits"))
    rows.append(samples(name, BARE, milliseconds(own), "ms"))
    rows += [samples(name, f"forward through kvpack, {each}", milliseconds(s), "ms") for each, s in spent.items()]
    later = (STEPS - 1) * median(spent["later steps"])
    whole = [first + later + commit for first, commit in zip(spent["step 0"], spent["commit"], strict=True)]
    rows.append(samples(name, OVERHEAD, [each / ((STEPS + 1) * median(own)) - 1 for each in whole], "ratio"))
