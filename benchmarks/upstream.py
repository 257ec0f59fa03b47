"""Diffusers' own test suites, with stock pipelines and with kvpack enabled in each: which tests tell the difference.

    python -m benchmarks.upstream PATH_TO_DIFFUSERS_CHECKOUT --select tests/pipelines/wan/test_wan.py

The default stack, `full` with chunks of three latent frames, is the identity for the suites' clips of nine frames: the
output is the stock one's, and everything else is kvpack's. With `--chunk-frames 1` the clips have three chunks, and are
other videos than upstream's. Ends with 1 if an outcome differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT

WAN = ("tests/pipelines/wan/test_wan.py", "tests/pipelines/wan/test_wan_22.py")


def run(checkout: Path, select: list[str], options: dict[str, Any] | None) -> dict[str, Any]:
    """What the plugin saw in one run of the suites.

    Args:
        checkout: a clone of diffusers at the installed version's tag.
        select: test files or ids.
        options: of `kvpack.pipeline.enable`, or None for stock pipelines.
    """
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "outcomes.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.upstream_plugin", "--outcomes", str(seen)]
        command += ["--kvpack", json.dumps(options)] if options is not None else []
        done = subprocess.run([*command, *select], cwd=checkout, env=_environment(), check=False)
        if not seen.exists():
            raise SystemExit(f"pytest ended with {done.returncode} and ran nothing")
        return dict(json.loads(seen.read_text()))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def differences(stock: dict[str, str], packed: dict[str, str]) -> list[tuple[str, str, str]]:
    """Tests whose outcome differs: id, outcome with stock pipelines, outcome with kvpack."""
    tests = sorted({*stock, *packed})
    both = [(test, stock.get(test, "not run"), packed.get(test, "not run")) for test in tests]
    return [each for each in both if each[1] != each[2]]


def main() -> int:
    """1 if an outcome differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--select", nargs="+", default=list(WAN))
    parser.add_argument("--stack", default="full")
    parser.add_argument("--chunk-frames", type=int, default=3)
    given = parser.parse_args()
    stock = run(given.checkout, given.select, None)
    packed = run(given.checkout, given.select, {"stack": given.stack, "chunk_frames": given.chunk_frames})
    for name, seen in (("stock", stock), (given.stack, packed)):
        print(f"{name}: {dict(Counter(seen['tests'].values()))}, {seen['enabled']} pipelines enabled")
    for reason, count in packed["refused"].items():
        print(f"{count} pipelines not enabled: {reason}")
    found = differences(stock["tests"], packed["tests"])
    for test, before, after in found:
        print(f"{test}: {before}, with kvpack {after}")
    print(f"{len(found)} of {len(stock['tests'])} tests differ")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
