"""The Triton kernel of a rotation in Triton's interpreter, against what a CPU computes."""

import importlib
import sys

import pytest
import torch

from kvpack.memory.rope import rotate

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rotate_pairs():
    """The kernel, read anew under the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        sys.modules.pop("kvpack.memory.rotation_kernel", None)
        yield importlib.import_module("kvpack.memory.rotation_kernel").rotate_pairs
    sys.modules.pop("kvpack.memory.rotation_kernel", None)


# The interpreter cuts bfloat16 off where a device rounds: one unit in the last place instead of half of one.
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 2**-23), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)]
)
@pytest.mark.parametrize(("rows", "turned_rows", "turned_heads"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 3)])
def test_the_kernel_rotates_as_the_cpu_does(dtype, error, rows, turned_rows, turned_heads, rotate_pairs):
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(rows, 9, 3, 20, generator=draw).to(dtype)[:, 2:7]
    angles = torch.randn(turned_rows, 5, turned_heads, 10, generator=draw)
    turns = torch.polar(torch.ones_like(angles), angles)
    room = torch.full((rows, 11, 3, 20), 7.0, dtype=dtype)
    given = rotate_pairs(vectors, turns, room[:, 3:8])
    length = vectors.float().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)
    assert ((given.float() - rotate(vectors, turns).float()).abs() <= error * length + 2**-24).all()
    assert given.data_ptr() == room[:, 3:8].data_ptr()
    assert (room[:, :3] == 7).all()
    assert (room[:, 8:] == 7).all()


def test_no_token_is_no_work(rotate_pairs):
    nothing = torch.empty(1, 0, 3, 20)
    assert rotate_pairs(nothing, torch.empty(1, 0, 1, 10, dtype=torch.complex64), nothing) is nothing
