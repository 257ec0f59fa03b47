"""Whether a generation fits a card: every part is counted, and the sum decides."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from kvpack import Session
from kvpack.adapters.wan.vae import StreamingDecoder
from kvpack.cli import app
from kvpack.errors import BudgetError, InvalidOptionError, UnsupportedPipelineError
from kvpack.memory import StateMemory
from kvpack.planning.budget import Choice
from kvpack.planning.cards import CARDS, place
from kvpack.planning.fit import GIB, MODEL_OFFLOAD, UMT5_XXL, Fit, fit, peak_bytes
from kvpack.planning.presets import preset
from kvpack.planning.resident import most_resident, passing
from kvpack.plugins.registry import registry
from kvpack.testing import TINY, run_session, tiny_wan_pipeline


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
    found = fit(configs, UMT5_XXL, (480, 832), torch.bfloat16, chunk_frames=4, rows=1)
    assert found.transformer == pytest.approx(2 * 1.42e9, rel=0.01)
    assert found.vae == pytest.approx(2 * 127e6, rel=0.01)
    assert found.text_encoder == pytest.approx(2 * 5.68e9, rel=0.01)
    assert found.decoding > 2 * 3 * 4 * 480 * 832  # at the least the pixels
    framewise = fit(configs, UMT5_XXL, (480, 832), torch.bfloat16, chunk_frames=1, rows=1)
    three = fit(configs, UMT5_XXL, (480, 832), torch.bfloat16, chunk_frames=3, rows=1)
    assert (framewise.decoding, framewise.features) == (
        three.decoding,
        three.features,
    )  # a frame is four pictures
    twice = fit(configs, UMT5_XXL, (480, 832), torch.bfloat16, chunk_frames=4, rows=2)
    assert 1.5 * found.denoising < twice.denoising < 2 * found.denoising  # tables of RoPE are shared


def test_activations_are_those_of_a_real_forward():
    """The same forward on real tensors: what the meter says of its meta twin is what is alive."""
    pipe = tiny_wan_pipeline(num_layers=1)
    configs = {"transformer": dict(pipe.transformer.config), "vae": dict(pipe.vae.config)}
    text = pipe.text_encoder.config.to_dict()
    found = fit(configs, text, (64, 64), torch.float32, chunk_frames=4, rows=1)
    latents, embeds = torch.zeros(1, 16, 4, 8, 8), torch.zeros(1, 512, 32)
    assert found.denoising == peak_bytes(lambda: pipe.transformer(latents, torch.zeros(1), embeds, return_dict=False))
    weights = sum(each.numel() for each in pipe.transformer.parameters()) * 4
    assert found.transformer == weights
    assert found.text_encoder == sum(each.numel() for each in pipe.text_encoder.parameters()) * 4
    decoder = StreamingDecoder(pipe.vae, 64, 64)
    decoder(latents)
    assert found.features == sum(each.nbytes for each in decoder.features if isinstance(each, torch.Tensor))


PARTS = Fit(10 * GIB, 1 * GIB, 11 * GIB, GIB // 2, GIB, 3 * GIB, GIB)
HELD = {"": 4, "tier=host": 2, "tier=host topk=1": 1}


def choose(gigabytes):
    """Stand for a memory that holds 4 GiB, 2 on the host and 1 with less attended."""
    room = round(gigabytes * 1e9)
    for changed, held in HELD.items():
        if held * GIB <= room:
            changes = dict(each.split("=") for each in changed.split())
            return Choice(None, held * GIB, room, changes, tuple(changes))
    raise BudgetError("too little", GIB)


@pytest.mark.parametrize(
    ("memory", "words", "total"),
    [
        (31, "fits 31 GiB with the whole pipeline on the card", 30),
        (30, "fits 30 GiB with the whole pipeline on the card", 30),
        (29.5, "fits 29.5 GiB with pipe.enable_model_cpu_offload()", 17),
        (17, "fits 17 GiB with pipe.enable_model_cpu_offload()", 17),
        (16, "fits 16 GiB with pipe.enable_model_cpu_offload() and -o tier=host, as budget_gb=3.221 chooses", 15),
        (14, "fits 14 GiB with pipe.enable_model_cpu_offload() and -o tier=host -o topk=1, as budget_gb=1.073 ", 14),
        (9, "fits 9 GiB with pipe.enable_sequential_cpu_offload()", 8.5),
        (8, "fits 8 GiB with pipe.enable_sequential_cpu_offload() and -o tier=host, as budget_gb=3.758 chooses", 6.5),
        (5, "does not fit 5 GiB: with the least memory it is 0.5 GiB too much", None),
        (2, "does not fit 2 GiB: with the least memory it is 3.5 GiB too much", None),
    ],
)
def test_the_fastest_way_that_fits_is_told(memory, words, total):
    placed = place(PARTS, memory, choose, 4 * GIB)
    assert placed.advice.startswith(words)
    assert (placed.call is None) == (total is None)
    if total is not None:
        assert placed.total == total * GIB <= memory * GIB


def test_quantised_weights_are_smaller_and_multiply_in_the_models_dtype():
    configs = preset("wan2.1-t2v-1.3b").configs
    size = {"chunk_frames": 4, "rows": 1}
    dense, int8, int4 = (
        fit(configs, UMT5_XXL, (480, 832), torch.bfloat16, **size, weights=each) for each in (None, "int8", "int4")
    )
    assert 0.5 < int8.transformer / dense.transformer < 0.51
    assert 4.5 / 16 < int4.transformer / dense.transformer < 0.3
    assert int8.text_encoder < 0.6 * dense.text_encoder  # its embeddings stay
    assert int8.vae == dense.vae
    assert int8.denoising - dense.denoising == 2 * 1536 * 9216  # of the time's projection
    with pytest.raises(InvalidOptionError, match="--weights must be one of int8, int4, got 'nf4'"):
        fit(configs, UMT5_XXL, (480, 832), torch.bfloat16, **size, weights="nf4")


def test_what_cannot_be_said_is_refused():
    with pytest.raises(InvalidOptionError, match="above 0 GiB"):
        place(PARTS, 0, choose, 4 * GIB)
    with pytest.raises(UnsupportedPipelineError, match="Wan's kind"):
        fit({"transformer": {}, "vae": {}}, {}, (64, 64), torch.float32, chunk_frames=4, rows=1)


def planned(*words):
    result = CliRunner().invoke(app, ["plan", "--preset", "wan2.1-t2v-1.3b", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("memory", [12, 24])
def test_plan_answers_whether_it_fits(memory):
    data = json.loads(planned("--gpu-memory", str(memory), "--json"))
    found = data["fit"]
    assert found["kv"] == data["resident_kv_bytes"] == data["budget"]["held_bytes"]
    assert found["advice"].startswith(f"fits {memory} GiB")
    assert bool(data["budget"]["changes"]) == (memory < 24)
    assert found["advice"] in planned("--gpu-memory", str(memory)).replace("\n", " ")


def test_plan_says_how_it_fits_all_cards_and_how_fast():
    shown = planned("--cards", "--weights", "int8", "--tflops", "400", "--bandwidth", "2000", "--json")
    data = json.loads(shown)
    assert list(data["cards"]) == [f"{each}" for each in CARDS] == ["8", "12", "16", "24", "32", "80"]
    assert "roofline" in data
    speed = data["roofline"]
    assert speed["operations"] == data["flops_per_chunk"] / 400e12 == speed["seconds"]
    assert speed["limit"] == "operations"
    assert 5 * data["attended_kv_bytes"] / 2e12 < speed["bytes"] < 5 * (data["attended_kv_bytes"] + 4e9) / 2e12
    shown = planned("--cards", "--tflops", "4000", "--bandwidth", "100", "--batch", "1")
    assert "32 GiB" in shown
    assert "bandwidth limits" in " ".join(shown.split())
    result = CliRunner().invoke(app, ["plan", "--preset", "wan2.1-t2v-1.3b", "--tflops", "400"])
    assert result.exit_code == 1
    assert "both --tflops and --bandwidth" in result.output


def test_plan_keeps_a_budget_and_says_each_step():
    data = json.loads(planned("--budget-gb", "4", "--json"))
    assert data["resident_kv_bytes"] == data["budget"]["held_bytes"] <= 4e9
    assert data["budget"]["changes"] == {"tier": "host", "topk": 12, "sink_frames": 4}
    shown = planned("--budget-gb", "4")
    for line in data["budget"]["lines"]:
        assert line in shown
    assert "packforcing holds at most 3.947 GB of 4 GB" in shown
    for words in (["--budget-gb", "1"], ["--budget-gb", "0"]):
        result = CliRunner().invoke(app, ["plan", "--preset", "wan2.1-t2v-1.3b", *words])
        assert result.exit_code == 1
        assert "budget_gb" in result.output


def test_plan_of_a_folder_reads_its_text_encoder(tmp_path):
    tiny_wan_pipeline().save_pretrained(tmp_path / "tiny")
    words = ["plan", "--model", str(tmp_path / "tiny"), "--gpu-memory", "24", "--size", "64x64", "--seconds", "2"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "fits 24 GiB with the whole pipeline on the card" in result.stdout


VALUES = [name for name in registry().names("stack") if isinstance(registry().stack(name, {}), StateMemory)]


@pytest.mark.parametrize("name", VALUES)
def test_what_a_memory_of_values_needs_beside_what_it_holds(name):
    """Not three windows of all layers: before, in and behind the chunk; a layer works with up to a fifth of it here."""
    geometry = replace(TINY, layers=30, grid=(4, 4))
    session = Session(registry().stack(name, {}), geometry)
    most = most_resident(geometry, session.stack, 9, 1)
    copies, own = passing(geometry, session.stack, rows=1, steps=2)
    needed = copies * most.bytes(geometry.layers) + own
    assert 0.6 < peak_bytes(lambda: run_session(session, 9, steps=2)) / needed < 1.2


@pytest.mark.parametrize(
    ("stack", "options", "frames", "blocks"),
    [
        ("packforcing", {}, None, 128),
        ("packforcing", {"archive_blocks": 40}, 480, 40),
        ("packforcing", {}, 80, 20),
        ("packforcing", {"archive_blocks": 16}, None, 0),  # of which all are attended
        ("packforcing", {"archive_blocks": None}, None, 0),  # nobody knows how many
        ("self-forcing", {}, None, 0),
    ],
)
def test_a_memory_in_arenas_needs_no_more_than_the_keys_of_a_layer_that_chooses(stack, options, frames, blocks):
    made, geometry = registry().stack(stack, options), replace(TINY, frames=frames)
    keys = made.compressor.span(0, 4, TINY.grid).tokens * TINY.width * TINY.dtype.itemsize
    assert passing(geometry, made, rows=2, steps=4) == (1, 2 * blocks * keys)


def test_a_memory_of_values_shrinks_until_both_of_its_windows_fit():
    """Not until one fits beside the second as it was asked for."""
    model = Fit(transformer=3 * GIB, vae=0, text_encoder=0, block=0, denoising=0, decoding=GIB, passing=GIB, copies=2)
    assert model.room(MODEL_OFFLOAD, 12) == (12 - 1 - 3 - 1) * GIB // 2
    full = replace(model, kv=model.room(MODEL_OFFLOAD, 12))
    assert full.totals[MODEL_OFFLOAD] in range(11 * GIB - 1, 11 * GIB + 1)
    assert replace(model, kv=2 * GIB, decoding=20 * GIB).totals[MODEL_OFFLOAD] == 22 * GIB  # decoding has it once
