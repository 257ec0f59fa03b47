"""Make the toy pipeline from nothing: every step in order, each done once, so that a run that was stopped goes on.

The plain world comes first, because it is learned in an hour and a half; the lit world, which needs memory, goes on
from its weights.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.toyworld import store

STEPS = (
    "train_vae --world plain --minutes 26",
    "encode --world plain",
    "train_transformer --world plain --minutes 53",
    "train_vae --world lit --start {out}/plain/vae.pt --minutes 67 --rate 5e-3",
    "encode --world lit",
    "train_transformer --world lit --start {out}/plain/transformer.pt --minutes 108",
    "export --out {out}/lit --to {to}",
    "evaluate --pipeline {to}",
)
SHIPPED = "kvpack/data/toyworld"


def command(step: str, out: Path, to: Path, smoke: bool) -> list[str]:
    """Return the words of one step, behind `python -m benchmarks.toyworld.`."""
    words = shlex.split(step.format(out=shlex.quote(str(out)), to=shlex.quote(str(to))))
    if "--world" in words:
        words += ["--out", str(out / words[words.index("--world") + 1])]
    return [*words, "--smoke"] if smoke and words[0] != "export" else words


def make(out: Path, to: Path, smoke: bool) -> None:
    """Run what is not done yet; `out/steps.json` says what is."""
    record = out / "steps.json"
    done: list[str] = json.loads(record.read_text()) if record.exists() else []
    for index, step in enumerate(STEPS):
        words = command(step, out, to, smoke)
        told = shlex.join(words)
        if told in done:
            print(f"[{index + 1}/{len(STEPS)}] {told}: done before", flush=True)
            continue
        print(f"[{index + 1}/{len(STEPS)}] {told}", flush=True)
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", f"benchmarks.toyworld.{words[0]}", *words[1:]], check=True)
        print(f"[{index + 1}/{len(STEPS)}] took {time.monotonic() - start:.0f} s", flush=True)
        done.append(told)
        out.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(done, indent=2) + "\n")


def main() -> None:
    """Make the shipped pipeline, or with `--smoke` a worthless one in a few steps."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toyworld", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, in a folder of its own")
    parser.add_argument("--out", type=Path, default=None, help="checkpoints; default runs/toyworld")
    parser.add_argument("--to", type=Path, default=None, help=f"the pipeline's folder; default {SHIPPED}")
    args = parser.parse_args()
    out = args.out or (store.RUNS.with_name("toyworld-smoke") if args.smoke else store.RUNS)
    make(out, args.to or (out / "pipeline" if args.smoke else Path(SHIPPED)), args.smoke)


if __name__ == "__main__":
    main()
