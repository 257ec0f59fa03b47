"""The bank predicts what the engine predicts, and students do in a stack what they were trained to do."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.trained import bank as banks
from benchmarks.trained.bank import Bank, Toy, gated
from benchmarks.trained.learning import Recipe, errors, lost, trained
from benchmarks.trained.policies import WEIGHTS, TrainedKeep
from benchmarks.trained.students import Hybrid, Kept, Twins, chosen_with
from kvpack import KVBlock, Span
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.layer import LayerCache
from kvpack.plugins.registry import registry
from kvpack.policies import FarthestCompressor, packforcing
from kvpack.policies.farthest import farthest, joined_heads
from kvpack.training.noise import mixed

CHUNKS, CLIPS = 8, 2


@pytest.fixture(scope="module")
def toy() -> Toy:
    """Return the shipped pipeline."""
    return Toy()


@pytest.fixture(scope="module")
def bank(toy: Toy) -> Bank:
    """Return a bank of two clips."""
    return banks.made(toy, banks.rendered(toy, CLIPS, 4 * CHUNKS, seed=0))


def test_the_bank_predicts_what_the_engine_predicts(toy: Toy, bank: Bank) -> None:
    """Whole blocks of largest mass behind a stack's own session; what the bank holds is rounded to half precision."""
    stack = replace(packforcing(topk=4, train_frames=20), compressor=registry().policy("compressor", "identity"))
    without = packforcing(topk=0, train_frames=20)
    # Later ones are behind chunks that were committed with a middle in the bank, and without one in the session.
    for memory, predicted, chunks in ((stack, bank.wanted, 8), (without, bank.without, 5)):
        rollout = toy.trainee.rollout(memory, bank.embeds, (4, 4), LayerCache)
        with torch.no_grad(), rollout.attached():
            for chunk in range(chunks):
                clean = bank.latents[:, :, 4 * chunk : 4 * chunk + 4].float()
                if chunk >= banks.FIRST:
                    noisy = mixed(clean, bank.noise[:, chunk].float(), toy.sigma)
                    found = rollout.predict(noisy, toy.timestep, 0)
                    wrong = (found - predicted[:, chunk].float()).square().mean()
                    assert wrong < 1e-4 * bank.worth[:, chunk].mean()
                rollout.commit(clean)
    assert bank.worth[:, 5].mean() > 0.001


def test_what_a_student_loses_is_1_without_a_middle_and_0_behind_whole_blocks(toy: Toy, bank: Bank) -> None:
    """Both ends of the measure; as many whole blocks as were wanted are all that there is to know."""
    assert lost(toy, bank, None, (5, 6)).value == pytest.approx(1.0, abs=0.01)
    assert lost(toy, bank, Kept(64, 4, "score"), (5, 6)).value == pytest.approx(0.0, abs=0.01)


def test_a_gate_of_0_takes_a_token_away_but_not_its_gradient() -> None:
    """So that a token that was dropped can be asked for."""
    queries, keys, values = (torch.randn(1, tokens, 2, 8) for tokens in (3, 5, 5))
    gates = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]], requires_grad=True)
    found, left = gated(queries, keys, values, gates), [0, 1, 3, 4]
    torch.testing.assert_close(found, gated(queries, keys[:, left], values[:, left], torch.ones(1, 4)))
    found.square().sum().backward()
    assert gates.grad is not None
    assert gates.grad[0, 2].abs() > 1e-4


def test_offsets_of_0_choose_the_farthest() -> None:
    """And a large one brings any token in."""
    unit = joined_heads(torch.randn(3, 64, 4, 32))
    index, _ = chosen_with(unit, torch.zeros(3, 64), 6)
    assert torch.equal(index, farthest(unit, 16, 6, 6))
    offsets = torch.zeros(3, 64)
    offsets[:, 17] = 5.0
    assert (chosen_with(unit, offsets, 6)[0][:, 0] == 17).all()


@pytest.mark.parametrize("how", ["offset", "score", "hybrid", "hr"])
def test_training_changes_a_student_and_lowers_its_loss(toy: Toy, bank: Bank, how: str) -> None:
    """On the few chunks that it is trained on."""
    torch.manual_seed(0)
    student = Twins(8, 4) if how == "hr" else Hybrid(3, 1, 4) if how == "hybrid" else Kept(4, 4, how)
    before = lost(toy, bank, student, (6, 7)).value
    trained(toy, bank, student, Recipe(steps=15, batch=2, rate=1e-2))
    assert lost(toy, bank, student, (6, 7)).value < before


def test_unweighted_training_counts_every_token_alike(toy: Toy, bank: Bank) -> None:
    """Its steps are others than those of the weighted loss."""
    weights = []
    for weighted in (True, False):
        torch.manual_seed(0)
        student = Twins(8, 4)
        trained(toy, bank, student, Recipe(steps=1, batch=2, weighted=weighted))
        weights.append(student.branch.projection.weight.detach().clone())
    assert not torch.equal(*weights)


@pytest.mark.parametrize("how", ["offset", "hybrid"])
def test_a_compressor_gives_what_its_student_gives(toy: Toy, bank: Bank, tmp_path: Path, how: str) -> None:
    """Weights go through a file; a block tells its layer."""
    torch.manual_seed(1)
    student = Hybrid(3, 1, 4) if how == "hybrid" else Kept(4, 4, how)
    assert student.features is not None
    torch.nn.init.normal_(student.features.last)
    student.eval()
    save_file({name: each.contiguous() for name, each in student.state_dict().items()}, tmp_path / WEIGHTS)
    keys, values = torch.randn(2, 2, 64, 4, 32)
    block = KVBlock(keys, values, Span(8, 4, grid_coordinates(4, (4, 4))), layer=3)
    found = TrainedKeep(weights=str(tmp_path), how=how, keep_tokens=4).compress(block, (4, 4))
    wanted = student.blocks(3, keys[:, None], values[:, None])
    assert torch.equal(found.keys, wanted.keys[:, 0])
    assert torch.equal(found.span.coordinates, wanted.places[:, 0])
    other = TrainedKeep(weights=str(tmp_path), how=how, keep_tokens=4).compress(replace(block, layer=1), (4, 4))
    assert not torch.equal(other.keys, found.keys)


def test_an_untrained_offset_is_keep_farthest_in_a_stack(toy: Toy, tmp_path: Path) -> None:
    """Tokens and places."""
    save_file({name: each.contiguous() for name, each in Kept(4, 4, "offset").state_dict().items()}, tmp_path / WEIGHTS)
    keys, values = torch.randn(2, 2, 64, 4, 32)
    block = KVBlock(keys, values, Span(8, 4, grid_coordinates(4, (4, 4))))
    found = TrainedKeep(weights=str(tmp_path), keep_tokens=4).compress(block, (4, 4))
    wanted = FarthestCompressor(keep_tokens=4).compress(block, (4, 4))
    assert torch.equal(found.values, wanted.values)
    assert torch.equal(found.span.coordinates, wanted.span.coordinates)


def test_errors_are_those_of_each_place(toy: Toy, bank: Bank) -> None:
    """So that they can be weighted."""
    assert errors(toy, bank, None, torch.tensor([0, 1]), 5).shape == (2, 4, 4, 4)
