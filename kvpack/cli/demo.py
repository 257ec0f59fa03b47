"""The demo: the pipeline that comes with kvpack makes minutes of video, through one memory or several side by side."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack.cli.demo_page import Story, page, picture
from kvpack.cli.demo_seen import Ends, Seen, kept, made
from kvpack.cli.support import unknown_words
from kvpack.media.contact_sheet import banner, side_by_side
from kvpack.media.files import make_folder, require_writable, save_bytes
from kvpack.media.video import Frames, VideoWriter
from kvpack.memory.base import Memory
from kvpack.pipeline.track import Track, load_pipeline, started
from kvpack.planning.planner import video_frames
from kvpack.planning.presets import timing
from kvpack.shipped import CALL, FPS, demo_stack, shipped_folder

PROMPT = "a red circle bouncing over dusk rings"
#: All of the past, a window of it, and a choice of it.
MEMORIES = ("full", "self-forcing", "packforcing")
COLUMNS = 8
UPSCALE, GAP = 4, 8


@dataclass(frozen=True)
class Demo:
    """What to generate, with which stacks and their options side by side, and where to put it.

    Args:
        model: another pipeline folder than the shipped one.
        seeds: videos of how many seeds are made besides, of which only the end is shown; 0 shows the kept ones, which
            are those of the shipped pipeline's usual prompt.
    """

    prompt: str
    seconds: float
    stacks: Sequence[tuple[str, Mapping[str, Any]]]
    folder: Path
    seed: int = 0
    steps: int = 6
    model: Path | None = None
    seeds: int = 0


def run(demo: Demo, on_chunk: Callable[[Track], None]) -> dict[str, Any]:
    """Generate the video, a picture, a page and the figures; return the figures.

    Several stacks take turns, chunk by chunk, so that the video is written while it is generated, in constant memory.

    Raises:
        KVPackError: if something cannot work or cannot be written; most of it before anything is generated.
    """
    folder = demo.model or shipped_folder()
    total, _ = video_frames(demo.seconds, FPS, timing(folder)[1])
    stacks = [demo_stack(name, **options) for name, options in demo.stacks]
    files = [require_writable(make_folder(demo.folder) / f"demo.{kind}") for kind in ("mp4", "png", "html", "json")]
    pipeline = load_pipeline(folder, torch.float32, "cpu")
    _warn_of_unknown_words(pipeline.tokenizer, demo.prompt)
    starts = sorted({round(start) for start in np.linspace(0, total - 1, COLUMNS)})
    seen = [Seen(starts) for _ in stacks]
    labels = [" ".join([name, *(f"{key}={value}" for key, value in given.items())]) for name, given in demo.stacks]
    arguments = {**CALL, "prompt": demo.prompt, "num_inference_steps": demo.steps}
    with ExitStack() as open_things, _one_thread():
        # The weights are shared; a pipeline is the stock one whenever another's turn comes.
        tracks = [
            open_things.enter_context(
                started(type(pipeline)(**pipeline.components), stack, total, demo.seed, arguments)
            )
            for stack in stacks
        ]
        writer = open_things.enter_context(VideoWriter(files[0], FPS, upscale=6 if len(tracks) == 1 else 1))
        _generate(tracks, seen, writer, labels, on_chunk)
    result = {
        "prompt": demo.prompt,
        "seed": demo.seed,
        "steps": demo.steps,
        "fps": FPS,
        "frames": tracks[0].frames,
        "seconds": tracks[0].frames / FPS,
        "files": [str(file) for file in files],
        "stacks": [{**track.report(), **each.report()} for track, each in zip(tracks, seen, strict=True)],
    }
    with _one_thread():
        truth, ends, length = _besides(demo, pipeline, dict(zip(labels, stacks, strict=True)), starts, total)
    times = [start / FPS for start in starts]
    story = Story(demo.prompt, total / FPS, times, labels, seen, truth, ends, length)
    drawn = picture(story)
    save_bytes(drawn, files[1])
    save_bytes(page(story, drawn, files[0].name).encode(), files[2])
    save_bytes((json.dumps(result, indent=2) + "\n").encode(), files[3])
    return result


def _besides(
    demo: Demo, pipeline: Any, stacks: Mapping[str, Memory], starts: Sequence[int], total: int
) -> tuple[list[Frames], dict[str, Ends], float]:
    """Return frames of a rendered video at these places, and the ends over several seeds, as far as there are any."""
    known = kept()
    if known and (demo.prompt, demo.steps, demo.model) != (known.prompt, known.steps, None):
        known = None
    truth = known.truth if known and round(total / FPS) == known.seconds and len(starts) == COLUMNS else []
    if demo.seeds:
        ends = {name: made(pipeline, each, demo.prompt, demo.seeds, total, demo.steps) for name, each in stacks.items()}
        return truth, ends, total / FPS
    if known is None:
        return truth, {}, 0.0
    same = [name for name, stack in stacks.items() if known.of(name, stack)]
    return truth, {name: known.ends[name] for name in (*same, "truth") if same}, known.seconds


def _generate(
    tracks: Sequence[Track],
    seen: Sequence[Seen],
    writer: VideoWriter,
    labels: Sequence[str],
    on_chunk: Callable[[Track], None],
) -> None:
    """Advance the tracks in turn, and write the frames that all of them have."""
    pending: list[Frames] = [np.empty((0, 0, 0, 3), dtype=np.uint8) for _ in tracks]
    top: Frames | None = None
    while True:
        for index, (track, each) in enumerate(zip(tracks, seen, strict=True)):
            if len(pending[index]) == 0:
                before = time.thread_time()
                frames = track.next_frames()
                if frames is None:
                    return
                each.add(track, frames, time.thread_time() - before)
                pending[index] = frames
                on_chunk(track)
        common = min(len(frames) for frames in pending)
        panels = [frames[:common] for frames in pending]
        pending = [frames[common:] for frames in pending]
        if len(panels) == 1:
            writer.write(panels[0])
            continue
        if top is None:
            top = banner(labels, UPSCALE * panels[0].shape[2], GAP)
        writer.write(side_by_side(panels, UPSCALE, top, GAP))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: for tensors this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _warn_of_unknown_words(tokenizer: Any, prompt: str) -> None:
    """Warn of the prompt's words that the pipeline's tokenizer does not know."""
    if unknown := unknown_words(tokenizer, prompt):
        known = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        words = f"{', '.join(unknown)}; it knows {', '.join(known)}"
        sys.stderr.write(f"warning: the demo's pipeline does not know {words}\n")
