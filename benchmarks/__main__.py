"""Runs every benchmark, each in a process of its own, and says which promises are kept.

Ends with 0 if all ran, also where a promise is not kept.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks import (
    anyflow,
    beside,
    choices,
    codecs,
    faults,
    flashdreams,
    hidden,
    hotpath,
    keeping,
    overhead,
    parallel,
    report,
    resident,
    rivals,
    rotation,
    simulation,
    snapshots,
    steady,
)

BENCHMARKS = {
    "rotation": rotation,
    "steady": steady,
    "resident": resident,
    "hotpath": hotpath,
    "overhead": overhead,
    "keeping": keeping,
    "choices": choices,
    "codecs": codecs,
    "hidden": hidden,
    "anyflow": anyflow,
    "flashdreams": flashdreams,
    "rivals": rivals,
    "snapshots": snapshots,
    "faults": faults,
    "parallel": parallel,
    "simulation": simulation,
    "beside": beside,
}


def main() -> int:
    """The number of benchmarks that failed to run."""
    options = report.parser(__doc__ or "").parse_args()
    folder = report.folder(options)
    skipped = [] if flashdreams.flashdreams_cache() else ["flashdreams"]
    failed = [name for name in BENCHMARKS if name not in skipped and not ran(name, options.small, str(folder))]
    print("\nSummary" + (" (small: only what does not depend on the size)" if options.small else ""))
    for name, module in BENCHMARKS.items():
        if name in skipped:
            print(f"{name}: skipped, {flashdreams.ABSENT}")
            continue
        if name in failed:
            print(f"{name}: FAILED")
            continue
        rows = report.read(folder / f"{name}.json")
        for bar in module.BARS:
            if not (options.small and bar.timed):
                print(f"{name}: {bar.verdict(rows)}")
    return len(failed)


def ran(name: str, small: bool, folder: str) -> bool:
    """Whether a benchmark ran to its end."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", folder, *(["--small"] if small else [])]
    return subprocess.run(command, cwd=report.ROOT, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
