"""A stock Wan says once that it is bidirectional; everything else is silent."""

import warnings

import pytest
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig

from kvpack.checkpoints.config import Settings
from kvpack.errors import BidirectionalWarning
from kvpack.testing import tiny_wan_pipeline


def loaded(folder, **parts):
    if not folder.exists():
        tiny_wan_pipeline().save_pretrained(folder)
    return WanPipeline.from_pretrained(folder, **parts)


def warned(pipeline):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            pipeline.enable_packforcing()
    return [str(each.message) for each in seen if each.category is BidirectionalWarning]


@pytest.mark.parametrize(
    "name",
    [
        "Wan2.1-T2V-1.3B-Diffusers",
        "Wan2.1-T2V-14B-Diffusers",
        "Wan2.2-TI2V-5B-Diffusers",
        "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers/snapshots/0fad780a",
    ],
)
def test_a_stock_wan_warns_once(name, tmp_path):
    (message,) = warned(loaded(tmp_path / name))
    assert f"{name}/transformer is bidirectional" in message


def test_the_line_is_the_users(tmp_path):
    with pytest.warns(BidirectionalWarning) as seen:
        loaded(tmp_path / "Wan2.1-T2V-1.3B").enable_packforcing()
    assert seen[0].filename == __file__


@pytest.mark.parametrize("name", ["self-forcing", "Wan2.1-T2V-1.3B-Self-Forcing", "my-Wan2.1-T2V-1.3B", "wan"])
def test_another_folder_does_not(name, tmp_path):
    assert warned(loaded(tmp_path / name)) == []


def test_causal_parts_in_a_stock_pipeline_do_not(tmp_path):
    stock = tmp_path / "Wan2.1-T2V-1.3B-Diffusers"
    loaded(tmp_path / "causal")
    causal = WanTransformer3DModel.from_pretrained(tmp_path / "causal", subfolder="transformer")
    assert warned(loaded(stock, transformer=causal)) == []
    with_lora = loaded(stock)
    with_lora.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert warned(with_lora) == []
    assert warned(tiny_wan_pipeline()) == []


def test_a_folder_with_settings_of_its_own_is_somebodys(tmp_path):
    pipeline = loaded(tmp_path / "Wan2.1-T2V-1.3B")
    Settings("full", {"chunk_frames": 4}).write(tmp_path / "Wan2.1-T2V-1.3B")
    assert warned(pipeline) == []
