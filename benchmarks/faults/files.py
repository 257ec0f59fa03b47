"""Snapshots that are damaged, or that a stranger has written."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.generation import Faults
from benchmarks.faults.tally import Tally
from benchmarks.report import say
from kvpack.errors import KVPackError
from kvpack.snapshots import folder as folders


def damaged(faults: Faults, count: int) -> Tally:
    """Damage one file of the newest snapshot; the one before is used."""
    tally = Tally()
    with faults.new_folder() as saved:
        faults.generate(saved, chunks=7)
        newest = max(saved.glob("snapshot-*"))
        own = [newest, *(saved / name for name in json.loads(newest.read_text())["files"])]
        for index in range(faults.times(count)):
            with faults.new_folder() as folder:
                copy = shutil.copytree(saved, folder / "copy")
                _damage(faults, copy / own[index % len(own)].name, index // len(own))
                faults.check(tally, copy)
    return tally


def _damage(faults: Faults, path: Path, kind: int) -> None:
    data, draw = bytearray(path.read_bytes()), faults.draw
    place = draw.randrange(len(data))
    if kind % 5 == 0:
        data[place] ^= 1 << draw.randrange(8)
    elif kind % 5 == 1:
        del data[place:]
    elif kind % 5 == 2:
        data[place : place + 64] = draw.randbytes(64)
    elif kind % 5 == 3:
        others = [each for each in sorted(path.parent.glob(f"*{path.suffix}")) if each != path]
        data = bytearray(draw.choice(others).read_bytes())
    else:
        path.unlink()
        return
    path.write_bytes(data)


def hostile(faults: Faults, count: int) -> Tally:
    """Change a snapshot's tree anywhere, with a fitting checksum; it is refused in one line, or goes on."""
    tally = Tally()
    with faults.new_folder() as folder:
        faults.generate(folder, chunks=5)
        min(folder.glob("snapshot-*")).unlink()
        (path,) = folder.glob("snapshot-*")
        content = json.loads(path.read_text())
        del content["sha256"]
        for _ in range(faults.times(count)):
            other = json.loads(json.dumps(content))
            _change(faults, other)
            path.write_text(json.dumps({**other, "sha256": folders._digest(other)}))
            tally.tried += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    faults.pipe.packforcing.resume(folder).close()
                except KVPackError as error:
                    tally.survived += "\n" not in str(error)
                except Exception as error:
                    say(f"faults: {type(error).__name__} of a changed tree: {error}")
                else:
                    tally.survived += 1
    return tally


def _change(faults: Faults, tree: Any) -> None:
    """Replace a node of a tree by another one, or by something else."""
    nodes = list(nodes_of(tree))
    parent, key = faults.draw.choice(nodes)
    other, place = faults.draw.choice(nodes)
    junk = [None, True, -1, 10**30, 1e300, "", "x" * 1000, [], {}, {"!": "tensor"}, [[[]]], other[place]]
    parent[key] = json.loads(json.dumps(faults.draw.choice(junk)))


def nodes_of(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield where each node of a tree is: its parent and its key or index."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from nodes_of(value)
