"""Whether a generation fits a card: every part is counted, and the sum decides."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvpack.cli import app
from kvpack.errors import InvalidOptionError, UnsupportedPipelineError
from kvpack.planning.fit import GIB, UMT5_XXL, Fit, fit, peak_bytes
from kvpack.planning.presets import preset
from kvpack.testing import tiny_wan_pipeline


def test_the_meter_counts_what_is_alive_at_once():
    def run():
        first = torch.empty(1000, device="meta")
        view, second = first.view(10, 100), first + 1
        del first
        third = second * 2
        del second, view
        return torch.cat([third, third])

    assert peak_bytes(run) == 4 * 3000  # of 1000 each: first, second and third; then third and twice as much

    def attend():
        query = torch.empty(1, 2, 4096, 16, device="meta")
        return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    assert peak_bytes(attend) == 2 * 4 * 2 * 4096 * 16


def test_published_sizes_are_counted():
    """Wan2.1-T2V-1.3B has 1.42 G parameters, its VAE 127 M, UMT5-XXL's encoder 5.68 G."""
    configs = preset("wan2.1-t2v-1.3b").configs
    found = fit(configs, UMT5_XXL, (480, 832), torch.bfloat16, chunk_frames=4, rows=1, kv=0, archive=0)
    assert found.transformer == pytest.approx(2 * 1.42e9, rel=0.01)
    assert found.vae == pytest.approx(2 * 127e6, rel=0.01)
    assert found.text_encoder == pytest.approx(2 * 5.68e9, rel=0.01)
    assert found.decoding > 2 * 3 * 4 * 480 * 832  # at the least the pixels
    twice = fit(configs, UMT5_XXL, (480, 832), torch.bfloat16, chunk_frames=4, rows=2, kv=0, archive=0)
    assert 1.5 * found.denoising < twice.denoising < 2 * found.denoising  # tables of RoPE are shared


def test_activations_are_those_of_a_real_forward():
    """The same forward on real tensors: what the meter says of its meta twin is what is alive."""
    pipe = tiny_wan_pipeline(num_layers=1)
    configs = {"transformer": dict(pipe.transformer.config), "vae": dict(pipe.vae.config)}
    text = pipe.text_encoder.config.to_dict()
    found = fit(configs, text, (64, 64), torch.float32, chunk_frames=4, rows=1, kv=0, archive=0)
    latents, embeds = torch.zeros(1, 16, 4, 8, 8), torch.zeros(1, 512, 32)
    assert found.denoising == peak_bytes(lambda: pipe.transformer(latents, torch.zeros(1), embeds, return_dict=False))
    weights = sum(each.numel() for each in pipe.transformer.parameters()) * 4
    assert found.transformer == weights
    assert found.text_encoder == sum(each.numel() for each in pipe.text_encoder.parameters()) * 4


PARTS = Fit(10 * GIB, 1 * GIB, 11 * GIB, GIB // 2, 4 * GIB, 3 * GIB, 2 * GIB, 3 * GIB)


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (31, "fits 31 GiB with the whole pipeline on the card"),
        (30, "fits 30 GiB with the whole pipeline on the card"),
        (29.5, "fits 29.5 GiB with pipe.enable_model_cpu_offload()"),
        (29, "fits 29 GiB with pipe.enable_model_cpu_offload()"),
        (17, "fits 17 GiB with pipe.enable_model_cpu_offload()"),
        (16, "fits 16 GiB with pipe.enable_model_cpu_offload() and -o tier=host, or -o archive_blocks=66"),
        (9, "fits 9 GiB with pipe.enable_sequential_cpu_offload()"),
        (8, "fits 8 GiB with pipe.enable_sequential_cpu_offload() and -o tier=host, or -o archive_blocks=83"),
        (4, "does not fit 4 GiB, 1.5 GiB too much"),
    ],
)
def test_the_fastest_way_that_fits_is_told(memory, words):
    assert PARTS.advice(memory, archive_blocks=100).startswith(words)


def test_what_cannot_be_said_is_refused():
    with pytest.raises(InvalidOptionError, match="above 0 GiB"):
        PARTS.advice(0, 0)
    with pytest.raises(UnsupportedPipelineError, match="Wan's kind"):
        fit({"transformer": {}, "vae": {}}, {}, (64, 64), torch.float32, chunk_frames=4, rows=1, kv=0, archive=0)


@pytest.mark.parametrize("memory", [8, 12, 24, 80])
def test_plan_answers_whether_it_fits(memory):
    words = ["plan", "--preset", "wan2.1-t2v-1.3b", "--gpu-memory", str(memory)]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    found = data["fit"]
    assert found["kv"] == data["resident_kv_bytes"]
    assert found["advice"].startswith(("fits ", "does not fit "))
    least = min(found["totals"].values()) - found["archive"]
    assert (f"fits {memory} GiB" in found["advice"]) == (least < (memory - 1) * GIB)
    shown = CliRunner().invoke(app, words)
    assert found["advice"] in shown.stdout.replace("\n", " ")


def test_plan_of_a_folder_reads_its_text_encoder(tmp_path):
    tiny_wan_pipeline().save_pretrained(tmp_path / "tiny")
    words = ["plan", "--model", str(tmp_path / "tiny"), "--gpu-memory", "24", "--size", "64x64", "--seconds", "2"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "fits 24 GiB with the whole pipeline on the card" in result.stdout
