"""Makes what `kvpack demo` shows but has no time to make: eight seeds of each memory, and the truth.

`python -m benchmarks.demo` writes `kvpack/data/demo`: `ends.png`, a row for each memory and one for the truth, with the
last frame of each seed; `truth.png`, frames of one rendered video; and `demo.json`, how alike the subject stayed.
"""

from __future__ import annotations

import argparse
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.baselines import through_vae
from benchmarks.leaderboard.lengths import frames as frames_of
from benchmarks.toyworld import world
from benchmarks.toyworld.world import Video
from kvpack.cli.demo import COLUMNS, MEMORIES, PROMPT
from kvpack.cli.demo_seen import Ends, alike, kept, made
from kvpack.evaluation import Observer
from kvpack.evaluation.tiny import tiny_facts
from kvpack.media.files import save_bytes
from kvpack.pipeline.track import load_pipeline
from kvpack.shipped import demo_stack, shipped_folder

OUT = Path(__file__).parents[1] / "kvpack/data/demo"
STEPS = 6


def rendered(pipe: Any, prompt: str, seed: int, seconds: int) -> Video:
    """Render a video of the world with that caption, through the model's VAE."""
    (scene,) = (each for each in world.SCENES if each.caption == prompt)
    return through_vae(pipe.vae, world.make_clip(scene, seed, frames_of(seconds)).video)


def truth(videos: list[Video]) -> Ends:
    """Look at rendered videos as at those of a memory."""
    likeness = []
    for video in videos:
        observer = Observer(tiny_facts())
        observer.add(video)
        likeness.append(alike(observer))
    return Ends([video[-1] for video in videos], likeness)


def sheet(rows: list[list[np.ndarray]]) -> bytes:
    """Return a PNG of rows of frames without anything between, as `kept` reads it."""
    data, whole = BytesIO(), np.concatenate([np.concatenate(row, axis=1) for row in rows])
    Image.fromarray(whole).save(data, format="png", optimize=True)
    return data.getvalue()


def main() -> None:
    """Make all of it: some minutes a memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--only", choices=MEMORIES, help="make this one anew, and keep the others")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pipe = load_pipeline(shipped_folder(), torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    found, count = {}, frames_of(given.seconds)
    before = kept() if given.only else None
    stacks = {memory: demo_stack(memory) for memory in MEMORIES}
    for memory in MEMORIES:
        if before and memory != given.only:
            found[memory] = before.ends[memory]
            continue
        found[memory] = made(pipe, stacks[memory], given.prompt, given.seeds, count, STEPS)
        print(memory, found[memory].likeness, flush=True)
    if before:
        found["truth"], strip = before.ends["truth"], before.truth
    else:
        real = [rendered(pipe, given.prompt, seed, given.seconds) for seed in range(given.seeds)]
        found["truth"] = truth(real)
        strip = [real[0][round(start)] for start in np.linspace(0, count - 1, COLUMNS)]
    save_bytes(sheet([each.pictures for each in found.values()]), given.out / "ends.png")
    save_bytes(sheet([strip]), given.out / "truth.png")
    likeness = {name: each.likeness for name, each in found.items()}
    forms = {name: stack.to_dict() for name, stack in stacks.items()}
    told = {"prompt": given.prompt, "seconds": given.seconds, "steps": STEPS, "stacks": forms, "likeness": likeness}
    save_bytes((json.dumps(told) + "\n").encode(), given.out / "demo.json")


if __name__ == "__main__":
    main()
