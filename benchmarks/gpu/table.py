"""What cards have said, as a table: `benchmarks/results/gpu/` holds the files that `make gpu` wrote on them."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.gpu.generation import CHUNK, OVERHEAD
from benchmarks.report import RESULTS

FPS, HELD, PEAK, PLANNED = (
    "pixel frames a second, without decoding",
    "held: stats()['resident_bytes']",
    "peak allocated",
    "peak allocated / planned",
)
HEAD = ["card", "memory", "ms a chunk", "frames a second", "over the bare transformer", "held", "peak", "peak / plan"]


def cards() -> list[dict[str, Any]]:
    """Return what was measured, file by file."""
    return [json.loads(file.read_text()) for file in sorted((RESULTS / "gpu").glob("*.json"))]


def rows() -> list[list[str]]:
    """Return a row for each memory that was measured on a card."""
    made = []
    for measured in cards():
        card = measured["machine"]["card"]
        for section in measured["sections"]:
            values = {(row["subject"], row["metric"]): row["value"] for row in section["rows"]}
            for name in dict.fromkeys(subject for subject, metric in values if metric == OVERHEAD):
                of = {metric: value for (subject, metric), value in values.items() if subject == name}
                made.append(
                    [
                        card,
                        name,
                        f"{of[CHUNK]:.0f}",
                        f"{of[FPS]:.1f}",
                        f"+{of[OVERHEAD]:.1%}",
                        f"{of[HELD] / 1e9:.2f} GB",
                        f"{of[PEAK] / 1e9:.2f} GB",
                        f"{of[PLANNED]:.3f}",
                    ]
                )
    return made
