"""What people's checkpoints hold and how they are named, each with what must come of it."""

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from kvpack.checkpoints.reading import read_checkpoint
from kvpack.cli import app
from kvpack.errors import InvalidOptionError
from kvpack.testing import tiny_wan_pipeline, tiny_wan_transformer

BESIDE = {
    "step_counter": torch.tensor(7),
    "causal_mask": torch.ones(4, 4, dtype=torch.bool),
    "freqs": torch.ones(8, 4, dtype=torch.complex64),
    "blocks.0.position_ids": torch.arange(16, dtype=torch.int32),
    "blocks.0.norm.num_batches_tracked": torch.tensor(3),
    "attention_bias": torch.ones(4, dtype=torch.uint8),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_wan_pipeline().save_pretrained(folder)
    return folder


def convert(source, base, output, *more):
    words = ["convert", source, "--base", base, "--output", output, *more]
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("name", BESIDE)
def test_integers_masks_and_tables_beside_weights_are_no_weights(name, base, tmp_path):
    weights = tiny_wan_transformer().state_dict()
    torch.save({**weights, name: BESIDE[name]}, tmp_path / "model.pt")
    result = convert(tmp_path / "model.pt", base, tmp_path / "out", "--recipe", "self-forcing", "--json")
    assert result.exit_code == 0, result.output
    assert f'"tensors": {len(weights)}' in result.stdout


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_q.weight", "ffn.0.qweight", "ffn.0.weight_packed", "ffn.0.bias"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_weights_of_whole_numbers_are_quantised(name, dtype, tmp_path):
    save_file({name: torch.ones(4, 4, dtype=dtype), "ffn.0.scale": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidOptionError, match=f"is quantised: 1 of its weights .* {name} of {dtype}"):
        read_checkpoint(tmp_path / "model.safetensors")
