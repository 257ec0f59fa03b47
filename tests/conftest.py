"""Shapes in signatures are checked in every test: wrong ones raise where they happen."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from jaxtyping import install_import_hook

# Unchecked: tests give the core integers for floats, and wrong values that it has to refuse itself.
import kvpack.pipeline.enable
import kvpack.scheduler

torch.set_num_threads(1)  # the tensors are tiny; threads only wait for each other

with install_import_hook("kvpack", "beartype.beartype"):
    import kvpack.adapters
    import kvpack.policies
    import kvpack.testing  # noqa: F401


@pytest.fixture(autouse=True)
def _backend():
    """`set_attention_backend` sets diffusers' backend for the whole process; the next test has the one of before."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before
