"""Compare memories on the toy world at 5, 30, 60 and 120 seconds, beside the truth and what is worse than any memory.

Figures go to benchmarks/results/leaderboard.json (videos up to each length, `drift` from their first to their last five
seconds, cost, paired differences), leaderboard-over-time.json (bins of 5 s by their end), leaderboard.md and pictures.
Low and high are 95 % bootstrap intervals over captions and their seeds; those of costs are least and greatest of the
seeds. With --subjects only their figures are replaced. Ends with 1 if a subject failed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mode

from benchmarks import report
from benchmarks.leaderboard import figures, lamps, plots, run, tables
from benchmarks.leaderboard.figures import Measured
from benchmarks.leaderboard.subjects import COMPARED, HERO, REFERENCES, TRAINED, Memory, memories
from benchmarks.report import Score
from benchmarks.toyworld import world
from kvpack.media.files import save_bytes

SECONDS, SEEDS = 120, 3
SMOKE = (HERO, "truth")
# Enough to tell apart in one picture, what matters most first.
PLOTTED = (HERO, TRAINED, "packforcing-paper", "full", "self-forcing", "window with sink 4, contiguous", "truth")
# A picture of these would say nothing.
UNSEEN = ("noise", "frozen", "shuffled")
NAME, BINS = "leaderboard", "leaderboard-over-time"


def main() -> int:
    """Run the command line."""
    subjects: dict[str, Memory | str] = {**{each.name: each for each in memories()}, **{n: n for n in REFERENCES}}
    parser = run.parser(__doc__ or "", SECONDS, SEEDS)
    parser.add_argument("--subjects", nargs="+", choices=list(subjects), metavar="SUBJECT", help=listed(subjects))
    parser.add_argument("--full-seconds", type=int, help="length of `full`, whose time grows (default: --seconds)")
    options = run.parsed(parser)
    chosen = options.subjects or (SMOKE if options.smoke else tuple(subjects))
    own: dict[str, int] = {"full": options.full_seconds} if options.full_seconds else {}
    found, failed = run.measured([subjects[name] for name in chosen], options, own)
    if not found:
        return 1
    rows, bins = (
        run.stamped(each, NAME) for each in (_scores(found, options.resamples), _bins(found, options.resamples))
    )
    if options.subjects:
        rows = report.merged(options.out / f"{NAME}.json", rows)
        bins = report.merged(options.out / f"{BINS}.json", bins)
    report.write(NAME, rows, options.out)
    report.write(BINS, bins, options.out)
    _pages(rows, bins, options)
    if not options.subjects:
        save_bytes(plots.sheet(found), options.out / f"{NAME}-sheet.png")
        shown = [each for each in found if each.name not in UNSEEN]
        title = f'Walls lit, and in what colour: "{world.HELD_OUT[0].caption}", seed 0'
        plots.save(options.out / f"{NAME}-lamps.png", lambda: lamps.timeline(shown, title))
    print(f"written to {options.out / NAME}.json and beside it", flush=True)
    return 1 if failed else 0


def _scores(found: Sequence[Measured], resamples: int) -> list[Score]:
    truth = next((each for each in found if each.name == "truth"), None)
    rows = [row for each in found for row in figures.scores(each, truth, resamples)]
    for hero in (each for each in found if each.name in COMPARED):
        rivals = [each for each in found if each.name not in (hero.name, *REFERENCES)]
        rows += [row for rival in rivals for row in figures.differences(hero, rival, resamples)]
    return rows


def _bins(found: Sequence[Measured], resamples: int) -> list[Score]:
    return [row for each in found for row in figures.over_time(each, resamples)]


def _pages(rows: Sequence[Score], bins: Sequence[Score], options: argparse.Namespace) -> None:
    """Write the table, plots at the length that most videos have, and one more of the subjects whose are longer."""
    subjects = list(dict.fromkeys(row.subject for row in rows if " minus " not in row.subject))
    page = f"# Memories on the toy world\n\n{tables.leaderboard(rows, subjects, COMPARED)}\n"
    save_bytes(page.encode(), options.out / f"{NAME}.md")
    ends = sorted(max(row.seconds for row in rows if row.subject == name) for name in subjects)
    most, common = ends[-1], mode(ends)
    wanted = options.subjects or PLOTTED
    _plot([row for row in bins if row.seconds <= common], wanted, options.out / f"{NAME}.png")
    recalled = options.out / f"{NAME}-recall.png"
    plots.save(recalled, lambda: plots.over_budget(rows, common, plots.RECALLED))
    if most > common:
        longest = [name for name in subjects if any(row.subject == name and row.seconds == most for row in rows)]
        _plot([row for row in bins if row.subject in longest], longest, options.out / f"{NAME}-long.png")


def _plot(bins: Sequence[Score], subjects: Sequence[str], path: Path) -> None:
    shown = [name for name in subjects if any(row.subject == name for row in bins)]
    if shown:
        plots.save(path, lambda: plots.over_time(bins, shown, "Bins of 5 s: means and 95 % intervals"))


def listed(names: Iterable[str]) -> str:
    """Return names as the shell takes them, quoted where they hold spaces or commas."""
    return " ".join(map(shlex.quote, names))


if __name__ == "__main__":
    sys.exit(main())
