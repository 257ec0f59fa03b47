"""The learned branch of a compressor: its shapes, its start, its files, and whose weights it refuses."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from kvpack.compressors import weights as branches
from kvpack.compressors.network import HighResolutionBranch, strides
from kvpack.compressors.weights import CompressorWeights, branch_config, load_branch
from kvpack.errors import InvalidOptionError
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import stack_from_dict
from kvpack.policies import DualCompressor, HighResolutionCompressor
from kvpack.policies.dual import trained_compressor
from kvpack.policies.pool import pooled_grid
from kvpack.testing import check_policy

TINY = {"channels": 16, "width": 24, "patch": (2, 2), "hidden": 4}


@pytest.fixture
def trained():
    """A branch whose projection is not zero."""
    branch = HighResolutionBranch(**TINY, base_model="tiny")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        branch.projection.weight.copy_(torch.randn(24, 4, generator=generator))
        branch.projection.bias.copy_(torch.randn(24, generator=generator))
    return branch


@pytest.fixture
def folder(trained, tmp_path):
    trained.save_pretrained(tmp_path / "compressor")
    return str(tmp_path / "compressor")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a local folder must not reach the network")

    monkeypatch.setattr("kvpack.compressors.weights.hf_hub_download", refuse)
    monkeypatch.setattr("kvpack.compressors.network.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", refuse)


SHAPES = st.tuples(
    st.integers(1, 5),  # channels
    st.integers(1, 9),  # width
    st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 2), (4, 4)]),
    st.integers(1, 5),  # frames
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_any_geometry_gives_the_exact_tokens_and_drops_nothing(shape):
    channels, width, patch, frames, grid = shape
    branch = HighResolutionBranch(channels=channels, width=width, patch=patch, hidden=3).double()
    rows, columns = (side * tokens for side, tokens in zip(patch, grid, strict=True))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, channels, frames, rows, columns, generator=generator, dtype=torch.float64)
    pooled = pooled_grid(frames, grid)
    tokens = branch(latents, pooled)
    assert tokens.shape == (2, pooled[0] * pooled[1] * pooled[2], width)
    assert not bool(tokens.any())

    torch.nn.init.normal_(branch.projection.weight, generator=generator)
    latents.requires_grad_()
    weights = torch.randn(tokens.shape, generator=generator, dtype=torch.float64)
    (branch(latents, pooled) * weights).sum().backward()
    assert bool((latents.grad != 0).all())  # every latent has an influence
    counted = branch.flops((frames, rows, columns), pooled[0] * pooled[1] * pooled[2])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        branch(latents.detach()[:1], pooled)
    assert counter.get_total_flops() == counted


def test_there_are_always_four_convolutions():
    for patch in ((1, 1), (2, 2), (4, 4), (1, 2)):
        branch = HighResolutionBranch(channels=4, width=6, patch=patch, hidden=2)
        assert [convolution.stride for convolution in branch.convolutions] == strides(patch)
        assert len(strides(patch)) == 4
    assert strides((1, 2)) == [(2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 1, 2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, trained):
    latents = torch.randn(1, 16, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    wanted = trained(latents, (2, 1, 1))
    found = copy.deepcopy(trained).to(dtype)(latents, (2, 1, 1))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)


def test_making_one_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    first, second, other = (HighResolutionBranch(**TINY, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [branch.convolutions[0].weight for branch in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_saved_and_loaded_bit_for_bit(trained, tmp_path, capsys):
    for dtype in (torch.float32, torch.bfloat16):
        place = tmp_path / str(dtype)
        branch = trained.to(dtype)
        branch.save_pretrained(place)
        for found in (HighResolutionBranch.from_pretrained(place), load_branch(str(place))):
            assert found.state_dict().keys() == branch.state_dict().keys()
            for name, weight in branch.state_dict().items():
                assert found.state_dict()[name].dtype == dtype
                assert torch.equal(found.state_dict()[name], weight)
        assert {path.name for path in place.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert "Loading" not in capsys.readouterr().out  # stdout belongs to `--json`


def test_the_config_says_how_it_is_used(folder):
    assert branch_config(folder) == {
        "base_model": "tiny",
        "branches": "dual",
        "channels": 16,
        "chunk_frames": None,
        "coordinates": "centered",
        "hidden": 4,
        "kvpack_version": branches.HighResolutionBranch(**TINY).kvpack_version,
        "patch": [2, 2],
        "project": "layers",
        "seed": 0,
        "width": 24,
    }
    card = Path(folder, "README.md").read_text()
    assert "library_name: kvpack" in card
    assert "2603.25730" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"patch": (0, 2)}, "patch must be >= 1, got 0"),
    ],
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(InvalidOptionError, match=message):
        HighResolutionBranch(**{**TINY, **options})


def test_weights_of_another_model_are_refused(folder, trained):
    for weights, named in ((folder, folder), (trained, "given as a module")):
        policy = HighResolutionCompressor(weights)
        policy.check(16, 24, (2, 2))
        for shape in ((48, 24, (2, 2)), (16, 36, (2, 2)), (16, 24, (1, 1))):
            with pytest.raises(InvalidOptionError, match="give weights trained for this model") as caught:
                policy.check(*shape)
            said = str(caught.value)
            assert named in said
            assert "made for tiny, are for channels=16, width=24, patch=(2, 2)" in said
            assert f"channels={shape[0]}, width={shape[1]}, patch={shape[2]}" in said


def test_broken_sources_are_named(folder, tmp_path):
    for source in (f"{tmp_path}/absent", "./absent", "a/b/c", "~/absent"):
        with pytest.raises(InvalidOptionError, match=r"no compressor folder .* give a folder .* or a Hub id"):
            trained_compressor(source)
    with pytest.raises(InvalidOptionError, match=r"has no config\.json"):
        trained_compressor(str(tmp_path))
    path = tmp_path / "compressor"
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights)
    save_file({name: each * torch.nan for name, each in load_file(path / "model.safetensors").items()}, path / "nan")
    (path / "nan").replace(path / "model.safetensors")
    with pytest.raises(InvalidOptionError, match=r"cannot load the compressor .* is not finite; train it anew"):
        load_branch(folder)
    (path / "model.safetensors").write_bytes(weights[:50])
    with pytest.raises(InvalidOptionError, match="cannot load the compressor"):
        load_branch(folder)
    (path / "model.safetensors").unlink()
    with pytest.raises(InvalidOptionError, match=r"has no model\.safetensors"):
        load_branch(folder)
    for text, message in (("{", "cannot read"), ("[]", "JSON object"), ('{"width": 3}', "channels, patch, width")):
        (path / "config.json").write_text(text)
        with pytest.raises(InvalidOptionError, match=message):
            branch_config(folder)


def test_a_hub_id_is_downloaded(folder, monkeypatch):
    asked = []

    def download(repo, name):
        asked.append((repo, name))
        return f"{folder}/{name}"

    monkeypatch.setattr(branches, "hf_hub_download", download)
    policy = trained_compressor("acme/compressor")
    assert policy == DualCompressor("acme/compressor")
    policy.check(16, 24, (2, 2))
    assert set(asked) == {("acme/compressor", "config.json"), ("acme/compressor", "model.safetensors")}

    def offline(*_):
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(branches, "hf_hub_download", offline)
    with pytest.raises(InvalidOptionError, match=r"no folder acme/other, and config.json of that Hub id cannot be had"):
        trained_compressor("acme/other")


def test_a_folder_becomes_what_its_config_says(tmp_path):
    HighResolutionBranch(**TINY, branches="hr", project="direct", coordinates="strided").save_pretrained(tmp_path / "a")
    source = str(tmp_path / "a")
    policy = trained_compressor(source)
    assert type(policy) is HighResolutionCompressor
    assert policy == HighResolutionCompressor(source, project="direct", coordinates="strided")


def test_weights_are_loaded_once_and_copied_for_each_dtype(folder, monkeypatch):
    loads = []
    monkeypatch.setattr(branches, "load_branch", lambda source: loads.append(source) or load_branch(source))
    source = CompressorWeights(folder)
    cpu = torch.device("cpu")
    first, again, other = (source.on(cpu, dtype, 16, 24, (2, 2)) for dtype in (torch.float32,) * 2 + (torch.bfloat16,))
    assert first is again
    assert other.projection.weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in (*first.parameters(), *other.parameters()))
    assert loads == [folder]


def test_a_module_that_is_trained_is_used_itself(trained):
    cpu = torch.device("cpu")
    source = CompressorWeights(trained)
    for dtype in (torch.float32, torch.bfloat16):
        assert source.on(cpu, dtype, 16, 24, (2, 2)) is trained
    trained.requires_grad_(False)
    assert source.on(cpu, torch.float32, 16, 24, (2, 2)) is trained
    assert source.on(cpu, torch.bfloat16, 16, 24, (2, 2)).projection.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("cls", [HighResolutionCompressor, DualCompressor])
def test_policies_keep_the_contract_with_weights(cls, folder):
    for chunk_frames in (4, 3):
        check_policy(cls(folder, project="direct"), chunk_frames)


def test_policies_are_data(folder, trained, tmp_path):
    stack = registry().stack("packforcing", {"compressor": folder})
    assert stack.compressor == DualCompressor(folder)
    data = json.loads(json.dumps(stack.to_dict()))
    assert data["compressor"]["weights"] == folder
    assert stack_from_dict(data) == stack
    stack.compressor.check(16, 24, (2, 2))  # loads
    assert pickle.loads(pickle.dumps(stack)) == copy.deepcopy(stack) == stack
    assert HighResolutionCompressor(tmp_path).weights == str(tmp_path)
    given = registry().stack("packforcing", {"compressor": HighResolutionCompressor(trained)})
    with pytest.raises(InvalidOptionError, match=r"weights of compressor hr is a High.*save_pretrained"):
        given.to_dict()
    with pytest.raises(InvalidOptionError, match="got int"):
        _wrong_weights()


def _wrong_weights():
    """Past beartype, which is on in tests only."""
    policy = object.__new__(HighResolutionCompressor)
    object.__setattr__(policy, "weights", 3)
    policy.__post_init__()


def test_an_unknown_word_is_told_what_else_works():
    with pytest.raises(InvalidOptionError, match=r"did you mean 'dual'.*folder or Hub id of trained weights works too"):
        registry().stack("packforcing", {"compressor": "duall"})


def test_weights_that_a_file_lacks_are_those_of_a_new_branch_where_that_is_allowed(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = sorted(weights)[0]
    save_file({name: each for name, each in weights.items() if name != lacking}, tmp_path / "model.safetensors")
    found = HighResolutionBranch.from_pretrained(tmp_path, strict=False)
    assert not any(each.is_meta for each in found.state_dict().values())
    with pytest.raises(RuntimeError, match=lacking):
        HighResolutionBranch.from_pretrained(tmp_path)


def test_a_branch_seeds_no_other_device(monkeypatch):
    def refuse(seed):
        raise AssertionError("it seeds generators of all devices")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    before = torch.get_rng_state()
    first, second = (HighResolutionBranch(channels=16, width=24, patch=(2, 2), seed=3) for _ in range(2))
    assert torch.equal(first.convolutions[0].weight, second.convolutions[0].weight)
    assert torch.equal(torch.get_rng_state(), before)
