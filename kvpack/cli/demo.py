"""The demo: the pipeline that comes with kvpack makes minutes of video, through one memory or several side by side."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack.media.contact_sheet import Row, banner, contact_sheet, side_by_side
from kvpack.media.video import Frames, VideoWriter, make_folder, require_writable, save_bytes
from kvpack.pipeline.track import Track, load_pipeline, started
from kvpack.planning.planner import video_frames
from kvpack.planning.presets import timing
from kvpack.shipped import CALL, FPS, demo_stack, shipped_folder

PROMPT = "a red circle bouncing over dusk rings"

COLUMNS = 10
TRAIL_SECONDS = 2
TRAIL_STEP = 4
GAP = 8


@dataclass(frozen=True)
class Demo:
    """What to generate and where to put it.

    Args:
        prompt: the caption.
        seconds: length of the video.
        stacks: names of the stacks, side by side, each with its options.
        folder: where demo.mp4, demo.png and demo.json go; made if it is not there.
        seed: of the noise, the same for every stack.
        steps: denoising steps of a chunk.
        model: another pipeline folder than the shipped one.
    """

    prompt: str
    seconds: float
    stacks: Sequence[tuple[str, Mapping[str, Any]]]
    folder: Path
    seed: int = 0
    steps: int = 6
    model: Path | None = None


@dataclass
class Samples:
    """Pictures for the contact sheet, picked while the frames go by.

    Args:
        starts: first frame of each column.
        trail: frames that a trail lasts.
    """

    starts: list[int]
    trail: int
    stills: dict[int, Frames] = field(default_factory=dict)
    trails: dict[int, Frames] = field(default_factory=dict)

    def add(self, first: int, frames: Frames) -> None:
        """Take stills and trails from frames that begin at `first`; a trail is the brightest value of each pixel."""
        for column, start in enumerate(self.starts):
            for index in range(max(start, first), min(start + self.trail, first + len(frames))):
                frame = frames[index - first]
                if index == start:
                    self.stills[column] = frame.copy()
                if (index - start) % TRAIL_STEP == 0:
                    self.trails[column] = np.maximum(self.trails.setdefault(column, frame), frame)

    def rows(self, label: str) -> list[Row]:
        """Return a row of stills and one of trails."""
        return [
            Row(label, [self.stills[column] for column in sorted(self.stills)]),
            Row(
                f"its path in the\nnext {self.trail / FPS:.2g} s",
                [self.trails[column] for column in sorted(self.trails)],
            ),
        ]


def run(demo: Demo, on_chunk: Callable[[Track], None]) -> dict[str, Any]:
    """Generate the video, the contact sheet and the figures; return the figures.

    Several stacks take turns, chunk by chunk, so that the video is written while it is generated, in constant memory.

    Args:
        demo: what to generate.
        on_chunk: called after every chunk.

    Raises:
        KVPackError: if something cannot work or cannot be written; most of it before anything is generated.
    """
    folder = demo.model or shipped_folder()
    total, _ = video_frames(demo.seconds, FPS, timing(folder)[1])
    stacks = [demo_stack(name, **options) for name, options in demo.stacks]
    video, sheet, figures = _outputs(demo.folder)
    pipeline = load_pipeline(folder, torch.float32, "cpu")
    _warn_of_unknown_words(pipeline.tokenizer, demo.prompt)
    trail = min(TRAIL_SECONDS * FPS, total)
    evenly = [round(start) for start in np.linspace(0, total - trail, COLUMNS)]
    columns = {f"{start / FPS:.1f} s": start for start in evenly}
    starts = list(columns.values())  # of a short video fewer than `COLUMNS`, no time twice
    samples = [Samples(starts, trail) for _ in stacks]
    arguments = {**CALL, "prompt": demo.prompt, "num_inference_steps": demo.steps}
    with ExitStack() as open_things:
        open_things.enter_context(_one_thread())
        # The weights are shared; a pipeline is the stock one whenever another's turn comes.
        tracks = [
            open_things.enter_context(
                started(type(pipeline)(**pipeline.components), stack, total, demo.seed, arguments)
            )
            for stack in stacks
        ]
        writer = open_things.enter_context(VideoWriter(video, FPS, upscale=6 if len(tracks) == 1 else 1))
        _generate(tracks, samples, writer, [_label(*each) for each in demo.stacks], on_chunk)
    result = _report(demo, tracks, (video, sheet, figures))
    labels = [_label(*each) for each in demo.stacks]
    rows = [row for label, each in zip(labels, samples, strict=True) for row in each.rows(label)]
    title = f'"{demo.prompt}", {total / FPS:.3g} s, seed {demo.seed}'
    save_bytes(contact_sheet(title, list(columns), rows), sheet)
    save_bytes((json.dumps(result, indent=2) + "\n").encode(), figures)
    return result


def _label(name: str, options: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{option}={value}" for option, value in options.items())])


def _generate(
    tracks: Sequence[Track],
    samples: Sequence[Samples],
    writer: VideoWriter,
    labels: Sequence[str],
    on_chunk: Callable[[Track], None],
) -> None:
    """Advance the tracks in turn, and write the frames that all of them have."""
    pending: list[Frames] = [np.empty((0, 0, 0, 3), dtype=np.uint8) for _ in tracks]
    top: Frames | None = None
    while True:
        for index, (track, picked) in enumerate(zip(tracks, samples, strict=True)):
            if len(pending[index]) == 0:
                frames = track.next_frames()
                if frames is None:
                    return
                picked.add(track.frames - len(frames), frames)
                pending[index] = frames
                on_chunk(track)
        common = min(len(frames) for frames in pending)
        panels = [frames[:common] for frames in pending]
        pending = [frames[common:] for frames in pending]
        if len(panels) > 1:
            upscale = 4
            if top is None:
                top = banner(labels, upscale * panels[0].shape[2], GAP)
            writer.write(side_by_side(panels, upscale, top, GAP))
        else:
            writer.write(panels[0])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: for tensors this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _outputs(folder: Path) -> tuple[Path, Path, Path]:
    video, sheet, figures = (
        require_writable(make_folder(folder) / f"demo.{suffix}") for suffix in ("mp4", "png", "json")
    )
    return video, sheet, figures


def _report(demo: Demo, tracks: Sequence[Track], files: Sequence[Path]) -> dict[str, Any]:
    return {
        "prompt": demo.prompt,
        "seed": demo.seed,
        "steps": demo.steps,
        "fps": FPS,
        "frames": tracks[0].frames,
        "seconds": tracks[0].frames / FPS,
        "files": [str(file) for file in files],
        "stacks": [track.report() for track in tracks],
    }


def _warn_of_unknown_words(tokenizer: Any, prompt: str) -> None:
    """Warn of the prompt's words that the pipeline's tokenizer does not know."""
    unknown = [
        word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids
    ]
    if unknown:
        known = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        words = f"{', '.join(unknown)}; it knows {', '.join(known)}"
        sys.stderr.write(f"warning: the demo's pipeline does not know {words}\n")
