"""Angles of LTX-2's RoPE: upstream's bits where upstream has any, and no jump where it has none."""

import pytest
import torch

from kvpack.adapters.sana_wm.rope import LTX2Rotary
from kvpack.memory import Tokens
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.memory.rope import rotate, rotations
from kvpack.testing import tiny_sana_wm_transformer

FRAMES = [0, 1, 2, 3, 11, 264, 5000]
ROTARY = LTX2Rotary(2, 16)
TINY = Geometry(1, 2, 16, (2, 3), rotary=ROTARY)


def places(frames, grid):
    steps = [grid_coordinates(1, grid).double() + torch.tensor([float(frame), 0.0, 0.0]) for frame in frames]
    return torch.cat(steps)[None]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_type": "split"},
        {"rope_double_precision": False},
        {"patch_size": 2, "in_channels": 16},
        {"num_attention_heads": 3, "attention_head_dim": 12, "cross_attention_dim": 36},  # no padding
        {"causal_offset": 0},
    ],
    ids=lambda config: "-".join(map(str, config)) or "default",
)
@pytest.mark.parametrize("fps", [16.0, 23.976])
def test_has_upstreams_bits(config, fps):
    transformer = tiny_sana_wm_transformer(**config)
    heads, head_dim = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    side = transformer.config.patch_size
    stock = transformer.build_rotary_emb_for_absolute_positions(1, FRAMES, 4, 6, torch.device("cpu"), fps)
    if transformer.config.rope_type == "split":
        cos, sin = (each.transpose(1, 2) for each in stock)  # (1, tokens, heads, half)
    else:
        cos, sin = (each.unflatten(2, (heads, -1))[..., ::2] for each in stock)
    rotary = LTX2Rotary(
        heads,
        head_dim,
        pixels=(8, 32 * side, 32 * side),
        causal_offset=transformer.config.causal_offset,
        double_precision=transformer.config.rope_double_precision,
        fps=fps,
    )
    turns = rotations(
        places(FRAMES, (4 // side, 6 // side)), Geometry(1, heads, head_dim, (4 // side, 6 // side), rotary=rotary)
    )
    assert torch.equal(turns.real, cos)
    assert torch.equal(turns.imag, sin)


def test_time_has_no_jump_and_never_stands_still():
    """Squeezed blocks sit between frames, and a squeezed first frame before the first one."""
    times = torch.linspace(-3, 3, 601, dtype=torch.float64)
    at = torch.zeros(1, len(times), 1, 3, dtype=torch.float64)
    at[0, :, 0, 0] = times
    slowest = ROTARY(at)[0, :, 0, 1]  # behind one still pair, the first frequency of time
    steps = slowest.diff()
    assert float(steps.min()) > 0
    assert float(steps.max()) <= 2.01 * float(steps.min())  # the first frame is half as long as the rest


def test_each_head_may_have_places_of_its_own():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 5, 2, 16, generator=generator)
    own = torch.rand(1, 5, 2, 3, generator=generator) * 9
    turned = Tokens(keys, values, own).rotated_keys(TINY)
    for head in range(2):
        alike = rotate(keys, rotations(own[:, :, head], TINY))
        assert torch.equal(turned[:, :, head], alike[:, :, head])
    assert not torch.equal(turned[:, :, 0], rotate(keys, rotations(own[:, :, 1], TINY))[:, :, 0])


def test_it_is_a_value():
    assert LTX2Rotary(2, 16) == LTX2Rotary(2, 16)
    assert len({TINY, Geometry(1, 2, 16, (2, 3), rotary=LTX2Rotary(2, 16, fps=16.0))}) == 2
