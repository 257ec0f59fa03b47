"""Shapes in signatures are checked in every test: wrong ones raise where they happen."""

import os

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from hypothesis import settings
from jaxtyping import install_import_hook

# Unchecked: tests give the core integers for floats, and wrong values that it has to refuse itself.

# The tensors are tiny: threads, also of the commands that tests start, only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

with install_import_hook("kvpack", "beartype.beartype"):
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
