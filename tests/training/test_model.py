"""What training takes from its model: its weights by Hub id, its frame rate."""

import pytest
import torch
from huggingface_hub import constants

from kvpack.checkpoints.config import Settings
from kvpack.testing import tiny_wan_pipeline
from kvpack.training import compressor
from kvpack.training.compressor import CompressorTraining, frozen


class Asked(Exception):
    """Stops a run where its clips are asked for."""


@pytest.fixture
def asked(monkeypatch):
    """The frame rate that a run asks its clips for."""

    def ask(**options):
        def stop(*_, fps, **__):
            raise Asked(fps)

        monkeypatch.setattr(compressor, "ClipFolder", stop)
        with pytest.raises(Asked) as error:
            CompressorTraining(cpu=True, hidden=8, **options).run()
        return error.value.args[0]

    return ask


def test_clips_are_read_at_the_models_own_frame_rate(asked, tmp_path):
    tiny_wan_pipeline().save_pretrained(tmp_path / "model")
    given = {"model": tmp_path / "model", "data": tmp_path, "output": tmp_path / "run"}
    assert asked(**given) == 16.0
    Settings(fps=24.0).write(tmp_path / "model")
    assert asked(**given) == 24.0
    assert asked(**given, fps=12.0) == 12.0


def test_a_model_by_its_hub_id(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--Acme--Tiny-Wan/snapshots/0123abcd"
    tiny_wan_pipeline().save_pretrained(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0123abcd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pipeline = frozen("Acme/Tiny-Wan", torch.float32, "cpu")
    assert not any(each.requires_grad for each in pipeline.transformer.parameters())
