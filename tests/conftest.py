"""Shapes in signatures are checked in every test: wrong ones raise where they happen."""

import gc
import json
import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

import jaxtyping
import pytest
import torch
from beartype import beartype
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from hypothesis import settings
from jaxtyping import AbstractArray, install_import_hook, jaxtyped

# Unchecked: tests give the core integers for floats, and wrong values that it has to refuse itself.
import kvpack.pipeline.enable
import kvpack.scheduler

# The tensors are tiny: threads, also of the commands that tests start, only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def _shaped(hint):
    """Whether a hint names a shape, or may, since it is a string yet."""
    named = isinstance(hint, str) or (isinstance(hint, type) and issubclass(hint, AbstractArray))
    return named or any(_shaped(each) for each in get_args(hint))


def _checked(thing, *, typechecker):
    """Check shapes where signatures name some, else types alone: names of dimensions cost ten times as much.

    What is inside another function is made in each of its calls, and its check would be: there only shapes are checked.
    """
    if isinstance(thing, type | classmethod | staticmethod | property):
        return jaxtyped(thing, typechecker=typechecker)
    shaped = any(map(_shaped, thing.__annotations__.values()))
    if "<locals>" in thing.__qualname__ and not shaped:
        return thing
    return jaxtyped(thing, typechecker=typechecker) if shaped else beartype(thing)


# For good: functions inside others are made, and checked so, when those are called.
jaxtyping.jaxtyped = lambda *, typechecker: partial(_checked, typechecker=typechecker)

with install_import_hook("kvpack", "beartype.beartype"):
    import kvpack.adapters
    import kvpack.policies  # noqa: F401
    from kvpack.testing import tiny_wan_pipeline

settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")


def pytest_collection_finish():
    """Leave what is imported out of garbage collection, which would look through it again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _process():
    """Give the next test what was there before: diffusers' attention backend, and what loggers tell."""
    loggers = [logging.getLogger(name) for name in ("kvpack", "diffusers")]
    levels, backend = [each.level for each in loggers], _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = backend
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model, which no test changes."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_wan_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """What does what `python -c` does, in a fork of an interpreter that has imported neither kvpack nor diffusers."""
    with _interpreter(tmp_path_factory.mktemp("python")) as run:
        yield run


@pytest.fixture(scope="session")
def ready_python(tmp_path_factory):
    """As `python`, in a fork of one that has imported both."""
    with _interpreter(tmp_path_factory.mktemp("ready"), "kvpack.testing.pipelines", "kvpack.adapters.wan") as run:
        yield run


@contextmanager
def _interpreter(folder, *modules):
    files = [folder / name for name in ("stdout", "stderr")]
    command = [sys.executable, "-P", Path(__file__).with_name("interpreter.py"), *modules]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(code, *words, folder=".", path=()):
            for file in files:
                file.write_text("")
            asked = {"code": code, "words": words, "folder": folder, "path": path, "files": files}
            server.stdin.write(json.dumps(asked, default=str) + "\n")
            server.stdin.flush()
            return subprocess.CompletedProcess(code, int(server.stdout.readline()), *(f.read_text() for f in files))

        yield run
