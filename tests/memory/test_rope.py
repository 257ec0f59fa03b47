"""Rotation at any position, against the stock tables and against float64."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack.memory import rope
from kvpack.memory.blocks import cell_centers, grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.rope import rotate, rotations
from kvpack.testing import tiny_wan_transformer

WAN = Geometry(1, 2, 128, (3, 4), (44, 42, 42))


def test_equals_the_stock_table():
    transformer = tiny_wan_transformer(attention_head_dim=128)
    cos, sin = transformer.rope(torch.zeros(1, 16, 5, 6, 8))  # (1, 60, 1, 128) on a 3 x 4 grid
    turns = rotations(grid_coordinates(5, (3, 4))[None], WAN)
    torch.testing.assert_close(turns.real, cos[..., 0::2].float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(turns.imag, sin[..., 1::2].float(), rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    shift=st.floats(-50_000, 50_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_position_is_one_rounding_from_float64(shift, dtype):
    keys = torch.randn(1, 12, 2, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = grid_coordinates(1, (3, 4))[None].double() + torch.tensor([shift, 0.0, 0.0], dtype=torch.float64)
    axes = [
        positions[..., axis, None] * 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        for axis, width in enumerate(WAN.rope_split)
    ]
    angles = torch.cat(axes, dim=-1)[:, :, None]
    pairs = torch.view_as_complex(keys.double().unflatten(-1, (-1, 2)))
    exact = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    ulp = torch.finfo(dtype).eps
    error = (rotate(keys, rotations(positions, WAN)).double() - exact).abs()
    assert bool((error <= ulp * exact.abs() + 1e-6 * keys.abs().max().double()).all())


def test_float64_is_rotated_as_wide_with_gradients_and_without():
    keys = torch.randn(1, 12, 2, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turns = rotations(grid_coordinates(1, (3, 4))[None], WAN)
    assert torch.equal(rotate(keys, turns), rotate(keys.clone().requires_grad_(), turns))


def test_only_differences_of_position_matter():
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(2, 1, 1, 2, 128, generator=generator)

    def score(a, b):
        at = [rotations(torch.tensor([[[float(p), 2.0, 1.0]]]), WAN) for p in (a, b)]
        return (rotate(queries[None], at[0]) * rotate(keys[None], at[1])).sum()

    queries, keys = queries[0], keys[0]
    torch.testing.assert_close(score(3, 1), score(2003, 2001), rtol=1e-4, atol=1e-4)


def test_writes_into_a_part_of_a_buffer():
    keys = torch.randn(2, 3, 2, 128)
    turns = rotations(torch.rand(1, 3, 3) * 9, WAN)
    buffer = torch.zeros(2, 10, 2, 128)
    rotate(keys, turns, out=buffer[:, 4:7])
    assert torch.equal(buffer[:, 4:7], rotate(keys, turns))
    assert not buffer[:, :4].any()
    assert not buffer[:, 7:].any()


@pytest.mark.parametrize("raises", [None, ImportError("no triton"), RuntimeError("Failed to find C compiler")])
def test_a_kernel_that_does_not_compile_is_done_without(raises, monkeypatch, caplog):
    def rotate_pairs(vectors, turns, out):
        if raises is not None:
            raise raises
        return out

    given = SimpleNamespace() if isinstance(raises, ImportError) else SimpleNamespace(rotate_pairs=rotate_pairs)
    monkeypatch.setitem(sys.modules, "kvpack.memory.rotation_kernel", given)
    monkeypatch.setattr(logging.getLogger("kvpack"), "propagate", True)
    found = rope._kernel.__wrapped__(torch.device("cpu"))
    assert found is (rotate_pairs if raises is None else None)
    assert ("without Triton, which fails here: Failed to find C compiler" in caplog.text) == (
        isinstance(raises, RuntimeError)
    )


@pytest.mark.parametrize("fp64", [True, False])
def test_an_accelerator_without_float64_computes_angles_in_float32(fp64, monkeypatch):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=fp64))
    assert rope.wide_dtype(torch.device("xpu", 0)) == (torch.float64 if fp64 else torch.float32)
    assert rope.wide_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize(("cells", "pooled"), [(30, 7), (52, 13), (5, 2), (4, 4), (3, 1), (15, 4)])
def test_cell_centers_follow_adaptive_pooling(cells, pooled):
    index = torch.arange(cells, dtype=torch.float64)[None]
    pooled_index = torch.nn.functional.adaptive_avg_pool1d(index, pooled)[0]
    torch.testing.assert_close(cell_centers(cells, pooled).double(), pooled_index)


def test_memory_covers_the_whole_frame_not_a_corner():
    coordinates = grid_coordinates(4, (30, 52), (2, 7, 13))
    assert coordinates[:, 1].min() < 3
    assert coordinates[:, 1].max() > 26
    assert coordinates[:, 2].max() > 48
    assert sorted(set(coordinates[:, 0].tolist())) == [0.5, 2.5]
