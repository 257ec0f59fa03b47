"""Draws the pictures of the documents from real generations of the shipped pipeline: `python -m benchmarks.pictures`.

Two minutes of video through three memories. During each chunk the session says which past frames it attends, at which
positions, and how many tokens (`Session.plan`, `Session.attended`); behind it `stats()` says what bytes are held.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvpack.media.files import save_bytes
from kvpack.shipped import FPS, demo_stack, shipped_folder

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle bouncing over dusk rings"
#: Seconds of a latent frame: the VAE makes four pixel frames of it.
FRAME = 4 / FPS
COLOURS = {"sink": "#0072B2", "mid": "#D55E00", "recent": "#009E73", "archive": "#BBBBBB", "room": "#56B4E9"}
PARTS = {"sink": "first frames", "mid": "chosen compressed blocks", "recent": "whole frames"}
LABELS = {
    "full": "full: looks at all of the past",
    "self-forcing": "self-forcing: a window",
    "packforcing": "packforcing: a choice",
}
REINDEXERS = ("absolute", "sink-shift", "contiguous", "fit")


@dataclass(frozen=True)
class Look:
    """What one layer attends in one chunk.

    Args:
        first: the chunk's first latent frame.
        pieces: first frame, frames and part of each attended piece of the past.
        positions: temporal positions of the tokens of each part.
        tokens: tokens of history.
        start: temporal position of the chunk.
    """

    first: int
    pieces: list[tuple[int, int, str]]
    positions: dict[str, list[float]]
    tokens: int
    start: float


@dataclass
class Seen:
    """A generation: what each chunk attended, and what was held behind it."""

    looks: list[Look] = field(default_factory=list)
    stats: list[dict[str, Any]] = field(default_factory=list)


def look(session: Any, layer: int = 0) -> Look:
    """Read what a layer attends in the chunk in progress."""
    plan, cache = session.plan, session.caches[layer]
    parts: dict[str, list[Any]] = {name: [] for name in ("sink", "mid", "recent")}
    parts["sink"] = [plan.ledger.whole[index] for index in plan.sink]
    parts["recent"] = [plan.ledger.whole[index] for index in plan.recent]
    chosen = cache.selected[0].tolist() if cache.selected is not None else range(len(plan.mid))
    parts["mid"] = [plan.mid[index] for index in chosen]
    times = torch.cat([each.coordinates[0, :, 0] for each in cache.attended.tokens] or [torch.zeros(0)])
    each = session.geometry.tokens_per_frame
    sizes = {name: each * sum(piece.frames for piece in parts[name]) for name in ("sink", "recent")}
    sizes["mid"] = len(times) - sizes["sink"] - sizes["recent"]
    split = dict(zip(parts, times.split([sizes[name] for name in parts]), strict=True))
    pieces = [(piece.first_frame, piece.frames, name) for name, found in parts.items() for piece in found]
    return Look(
        plan.book.frames,
        pieces,
        {name: sorted(set(found.tolist())) for name, found in split.items()},
        session.attended(layer)[0].shape[1],
        float(torch.as_tensor(cache.attended.chunk_start).flatten()[0]),
    )


def seen(name: str, seconds: float, trace: Path | None = None, **options: Any) -> Seen:
    """Generate a video, and read what its memory does; into a trace, which has pictures, if one is given."""
    from diffusers import WanPipeline

    import kvpack

    pipe: Any = kvpack.enable(WanPipeline.from_pretrained(shipped_folder()), demo_stack(name, **options))
    pipe.set_progress_bar_config(disable=True)
    found = Seen()

    pipe.packforcing.trace(trace)

    def read(pipeline: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 0:
            (session,) = pipe.packforcing.sessions.values()
            found.looks.append(look(session))
        return {}

    frames, generator = round(seconds * FPS / 4) * 4 + 1, torch.Generator().manual_seed(0)
    call = {"num_frames": frames, "generator": generator, "output_type": "latent", "callback_on_step_end": read}
    if trace is not None:
        call = {**call, "output_type": "np", "callback_on_step_end": None}
    with closing(pipe.packforcing.stream(PROMPT, **call)) as chunks:
        for _ in chunks:
            found.stats.append(pipe.packforcing.stats())
    return found


def page(width: float, height: float, rows: int, columns: int, **grid: Any) -> tuple[Any, Any]:
    """Return a figure and its panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **grid)


def save(figure: Any, path: Path) -> None:
    """Write a picture."""
    from io import BytesIO

    data = BytesIO()
    figure.savefig(data, format="png", dpi=110)
    save_bytes(data.getvalue(), path)


def draw_attended(axes: Any, found: Seen, title: str) -> None:
    """Draw which past is attended when: a bar for each attended piece, a column for each chunk."""
    for part in ("recent", "sink", "mid"):
        bars = [
            (look.first * FRAME, first * FRAME, frames * FRAME)
            for look in found.looks
            for first, frames, name in look.pieces
            if name == part
        ]
        if bars:
            when, bottom, height = zip(*bars, strict=True)
            axes.bar(when, height, width=1.0, bottom=bottom, color=COLOURS[part], linewidth=0, label=PARTS[part])
    last = found.looks[-1].first * FRAME
    axes.plot([0, last], [0, last], color="black", linewidth=0.8)
    axes.legend(fontsize=9, loc="upper left", frameon=False)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("second of the video that is made")
    axes.set_ylabel("second of the past that it looks at")


def memories(videos: dict[str, Seen]) -> Any:
    """Draw what three memories look at, and how much they use of what they hold."""
    figure, panels = page(14, 3.6, 1, 4)
    for axes, (name, found) in zip(panels[0], videos.items(), strict=False):
        draw_attended(axes, found, LABELS[name])
    axes = panels[0][3]
    for name, found in videos.items():
        used = [(stats["attended_bytes"] + stats["archive_bytes"]) / 1e6 for stats in found.stats]
        axes.plot([(index + 1) * 4 * FRAME for index in range(len(used))], used, label=name)
    axes.set_title("keys and values in use, MB", fontsize=11)
    axes.set_xlabel("second of the video that is made")
    axes.set_ylim(0)
    axes.legend(fontsize=9)
    return figure


def positions(videos: dict[str, Seen], trained: int) -> Any:
    """Draw at which positions the last chunk finds its past, for each re-indexer."""
    figure, panels = page(10, 4.2, 1, 1)
    axes = panels[0][0]
    axes.axvspan(0, trained, color="#EEEEEE", label="positions seen in training")
    for row, found in enumerate(videos.values()):
        last = found.looks[-1]
        for part, places in last.positions.items():
            label = "" if row else PARTS[part]
            axes.plot(places, [row] * len(places), "|", ms=18, mew=2, color=COLOURS[part], label=label)
        chunk = [last.start + frame for frame in range(4)]
        axes.plot(chunk, [row] * 4, "|", ms=18, mew=2, color="black", label="" if row else "the new chunk")
    axes.set_yticks(range(len(videos)), list(videos))
    axes.set_ylim(-0.6, len(videos) - 0.4)
    axes.set_xscale("symlog", linthresh=trained)
    axes.set_xlim(-1, 300)
    ticks = [0, 5, 10, 15, trained, 50, 100, 200]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("temporal position, in latent frames (logarithmic beyond the grey)")
    axes.legend(fontsize=9, loc="lower right", bbox_to_anchor=(1, 1.01), ncols=5, frameon=False)
    return figure


def held(found: Seen) -> Any:
    """Draw the bytes that a session of packforcing holds, by part."""
    figure, panels = page(8, 3.6, 1, 1)
    axes = panels[0][0]
    seconds = [(index + 1) * 4 * FRAME for index in range(len(found.stats))]
    rows = {
        "attended history": [stats["attended_bytes"] for stats in found.stats],
        "archive of compressed blocks": [stats["archive_bytes"] for stats in found.stats],
        "one workspace of rotated keys for all layers": [stats["workspace_bytes"] for stats in found.stats],
    }
    rest = [
        stats["resident_bytes"] - sum(row[index] for row in rows.values()) for index, stats in enumerate(found.stats)
    ]
    rows["room for the chunk that is made, and for what comes"] = rest
    megabytes = [[count / 1e6 for count in row] for row in rows.values()]
    axes.stackplot(
        seconds, megabytes, labels=list(rows), colors=[COLOURS[each] for each in ("recent", "mid", "room", "archive")]
    )
    axes.set_xlabel("second of the video")
    axes.set_ylabel("MB")
    axes.legend(fontsize=8, loc="upper left")
    axes.set_ylim(0, 1.5 * max(stats["resident_bytes"] for stats in found.stats) / 1e6)
    return figure


def report(path: Path, seconds: float) -> None:
    """Take a picture of `kvpack report` for two memories; needs playwright and Chromium."""
    from playwright.sync_api import sync_playwright  # type: ignore[import-not-found,unused-ignore]

    from kvpack.cli.report import page as report_page
    from kvpack.cli.report import read_trace

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print(f"{path} was left as it is: Chromium is not installed")
        return
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        traces = [Path(folder, f"{name}.jsonl") for name in ("packforcing", "h2o")]
        for trace in traces:
            seen(trace.stem, seconds, trace)
        Path(folder, "report.html").write_text(report_page([read_trace(each) for each in traces]))
        tab = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        tab.set_viewport_size({"width": 1100, "height": 1570})
        tab.goto(Path(folder, "report.html").as_uri())
        for trace in (0, 1):
            place = tab.locator(f"#figure-{trace}-0 .nsewdrag").first.bounding_box()
            tab.mouse.move(place["x"] + 0.6 * place["width"], place["y"] + 0.5 * place["height"])
            tab.wait_for_function(f"document.getElementById('when-{trace}').textContent.startsWith('chunk')")
        tab.screenshot(path=path)


def ui(path: Path) -> None:
    """Take a picture of `kvpack ui` with two memories on one seed; needs gradio, playwright and Chromium."""
    from playwright.sync_api import sync_playwright  # type: ignore[import-not-found,unused-ignore]

    from kvpack.cli.ui.model import Model
    from kvpack.cli.ui.page import opened

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print(f"{path} was left as it is: Chromium is not installed")
        return
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page, address = opened(Model(device="cpu"), Path(folder))
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_viewport_size({"width": 1300, "height": 800})
        tab.goto(address)
        tab.get_by_label("Beside it").fill("full")
        tab.keyboard.press("Enter")
        tab.get_by_label("no faster").uncheck()
        tab.get_by_role("button", name="Start").click()
        tab.wait_for_function("document.querySelector('.kvp-seek').max > 160")
        tab.get_by_label("Prompt").fill("a blue square bouncing over plain slate")
        tab.get_by_role("button", name="Change prompt").click()
        tab.wait_for_function("document.querySelector('.kvp-when').value.startsWith('20')", timeout=60_000)
        tab.screenshot(path=path)
        browser.close()
        page.close()


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--seconds", type=float, default=120.0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    videos = {name: seen(name, given.seconds) for name in LABELS}
    save(memories(videos), given.out / "memories.png")
    save(held(seen("packforcing", 2 * given.seconds)), given.out / "held.png")  # behind the archive's bound
    indexed = {name: seen("packforcing", given.seconds / 2, reindexer=name) for name in REINDEXERS}
    save(positions(indexed, trained=20), given.out / "positions.png")
    report(given.out / "report.png", given.seconds / 2)
    ui(given.out / "ui.png")


if __name__ == "__main__":
    main()
