"""Measure minute-long rollouts of the toy pipeline under several memories, in segments of time.

Rows go to benchmarks/results/rollout.json: means over captions and seeds (the path residual's median), low and high
their 95 % bootstrap interval over captions (2,000 resamples, seeded).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

import kvpack
from benchmarks import report
from benchmarks.toyworld import measure, store, world

EDGES = (0, 5, 20, 40, 60)  # seconds
MEMORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "sink 4 + recent 4, absolute": ("self-forcing", {"window_frames": 12, "sink_frames": 4}),
    "sink 4 + recent 4, contiguous": (
        "self-forcing",
        {"window_frames": 12, "sink_frames": 4, "reindex": "contiguous"},
    ),
    "packforcing, pool": ("packforcing", {"compressor": "pool"}),
    "packforcing, lr": ("packforcing", {"compressor": "lr"}),
    "packforcing-fit, pool": ("packforcing-fit", {"compressor": "pool"}),
    "packforcing-fit, lr": ("packforcing-fit", {"compressor": "lr"}),
}


def rollout(pipe: Any, memory: str, scenes: list[world.Scene], seconds: int, seed: int) -> list[world.Video]:
    """One video a scene under one memory."""
    name, options = MEMORIES[memory]
    kvpack.enable(pipe, name, chunk_frames=4, **options)
    try:
        frames = pipe(
            [scene.caption for scene in scenes],
            height=world.SIZE,
            width=world.SIZE,
            num_frames=seconds * world.FPS + 1,
            num_inference_steps=4,
            guidance_scale=1.0,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).frames
    finally:
        kvpack.disable(pipe)
    return [np.round(video * 255).astype(np.uint8) for video in frames]


def figures(memory: str, segment: str, videos: list[measure.Summary], seeds: int) -> list[report.Row]:
    """Rows of one memory in one segment; `videos` has all captions of seed 0, then of seed 1, and so on."""
    captions = len(videos) // seeds
    draw = np.random.default_rng(report.SEED).integers(0, captions, (2000, captions))
    rows = []
    for field in fields(measure.Summary):
        centre = np.median if field.name == "path_fit" else np.mean
        values = np.array([getattr(video, field.name) for video in videos]).reshape(seeds, captions)
        drawn = np.sort([centre(values[:, picks]) for picks in draw])
        value, unit = float(centre(values)), "px" if field.name == "path_fit" else "ratio"
        low, high = min(value, float(drawn[50])), max(value, float(drawn[-51]))
        if not np.isfinite([low, value, high]).all():
            continue  # half of the windows have an invisible frame, so there is no median residual
        rows.append(report.Row(memory, f"{field.name}, {segment}", value, low, high, unit, len(videos)))
    return rows


def main() -> None:
    """Print one table a segment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=store.RUNS / "pipeline")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--memories", nargs="*", default=list(MEMORIES), choices=list(MEMORIES), metavar="MEMORY")
    parser.add_argument("--smoke", action="store_true", help="two seconds of one memory")
    args = parser.parse_args()
    if args.smoke:
        args.seconds, args.memories = 2, args.memories[:1]
    pipe = WanPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    edges = [world.FPS * edge for edge in EDGES if edge < args.seconds] + [world.FPS * args.seconds]
    found: dict[str, list[list[measure.Summary]]] = {}
    for memory in args.memories:
        for seed in range(args.seeds):
            videos = rollout(pipe, memory, list(world.HELD_OUT), args.seconds, seed)
            pairs = zip(videos, world.HELD_OUT, strict=True)
            found.setdefault(memory, []).extend(measure.segments(v, s, edges) for v, s in pairs)
        print(f"{memory}: done", flush=True)
    print(f"{len(world.HELD_OUT)} captions x {args.seeds} seeds, {args.seconds} s")
    rows: list[report.Row] = []
    for index, (begin, end) in enumerate(itertools.pairwise(edges)):
        segment = f"{begin // world.FPS}-{end // world.FPS} s"
        for memory, videos_found in found.items():
            rows += figures(memory, segment, [row[index] for row in videos_found], args.seeds)
        print(f"\n{begin // world.FPS}-{end // world.FPS} s\n")
        print(measure.table({m: measure.average([row[index] for row in rows]) for m, rows in found.items()}))
    command = " ".join(["python", "-m", "benchmarks.toyworld.rollout", *sys.argv[1:]])
    source = report.commit()
    rows = [replace(row, command=command, commit=source) for row in rows]
    folder = report.SMALL_RESULTS if args.smoke else report.RESULTS
    print(f"written to {report.write('rollout', rows, folder)}", flush=True)


if __name__ == "__main__":
    main()
