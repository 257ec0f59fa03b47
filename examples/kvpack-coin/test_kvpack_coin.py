import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kvpack_coin import CoinSelector

from kvpack.memory.roles import Candidates, Query
from kvpack.plugins.registry import registry
from kvpack.testing import check_policy, tiny_wan_pipeline


def test_it_keeps_the_contract():
    check_policy(CoinSelector(topk=2))


@dataclass(frozen=True)
class Thrown(CoinSelector):
    """Heads, tails, tails, heads, tails."""

    def heads(self, layer, chunk, blocks):
        return [True, False, False, True, False]


@pytest.mark.parametrize(("topk", "chosen"), [(1, [3]), (2, [3, 0]), (3, [3, 0, 4]), (4, [3, 0, 4, 2])])
def test_by_hand(topk, chosen):
    query = Query(torch.zeros(2, 6, 1, 4), layer=0, chunk=5)
    blocks = Candidates((0, 4, 8, 12, 16), (4,) * 5, torch.full((5,), 2), torch.zeros(2, 5, 1, 4), lambda block: None)
    assert Thrown(topk).select(query, blocks).tolist() == [chosen, chosen]


def test_tosses_differ_by_seed_layer_and_chunk_and_come_again():
    tosses = [CoinSelector(seed=s).heads(layer, chunk, 64) for s in (0, 1) for layer in (0, 1) for chunk in (0, 1)]
    assert len(set(map(tuple, tosses))) == 8
    assert CoinSelector(seed=1).heads(1, 1, 64) == tosses[-1]


def test_it_is_installed_and_makes_a_video():
    assert (
        registry().origins["selector", "coin-toss"] == registry().origins["stack", "coin-packforcing"] == "kvpack-coin"
    )
    pipe = tiny_wan_pipeline()
    pipe.enable_packforcing("coin-packforcing", topk=2)
    size = {"num_frames": 101, "height": 64, "width": 64, "num_inference_steps": 1}
    pipe("a coin", generator=torch.Generator().manual_seed(0), output_type="latent", **size)
    stats = pipe.packforcing.stats()
    assert stats["stack"] == "coin-packforcing"
    assert [len(row) for layer in stats["selected"] for row in layer] == [2] * len(stats["selected"])
    assert stats["policy_seconds"]["CoinSelector"] > 0


def test_the_blocks_of_the_readme_run():
    for block in re.findall(r"```python\n(.*?)```", Path(__file__).with_name("README.md").read_text(), re.DOTALL):
        exec(block, {})
