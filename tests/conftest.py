"""Shapes in signatures are checked in every test: wrong ones raise where they happen."""

import os
from functools import partial
from typing import get_args
from unittest.mock import patch

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
    """Check shapes where signatures name some, else types alone: names of dimensions cost ten times as much."""
    if isinstance(thing, type | classmethod | staticmethod | property):
        return jaxtyped(thing, typechecker=typechecker)
    shaped = any(map(_shaped, thing.__annotations__.values()))
    return jaxtyped(thing, typechecker=typechecker) if shaped else beartype(thing)


with (
    patch.object(jaxtyping, "jaxtyped", lambda *, typechecker: partial(_checked, typechecker=typechecker)),
    install_import_hook("kvpack", "beartype.beartype"),
):
    import kvpack.adapters
    import kvpack.policies  # noqa: F401
    from kvpack.testing import tiny_wan_pipeline

settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _backend():
    """`set_attention_backend` sets diffusers' backend for the whole process; the next test has the one of before."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model, which no test changes."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_wan_pipeline().save_pretrained(folder)
    return folder
