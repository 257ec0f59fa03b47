"""The comparison of diffusers' own suites, on a suite of our own in their manner."""

import sys

import pytest

from benchmarks import upstream

SUITE = """
import pytest, torch
from diffusers import WanPipeline
from transformers import AutoConfig, AutoTokenizer, T5EncoderModel
from kvpack.testing.pipelines import tiny_wan_pipeline


class TestOfTheirs:
    pipeline_class = WanPipeline

    def pipe(self):
        parts = tiny_wan_pipeline(text_dim=32).components
        text = {
            "tokenizer": AutoTokenizer.from_pretrained("hf-internal-testing/tiny-random-t5"),
            "text_encoder": T5EncoderModel(AutoConfig.from_pretrained("hf-internal-testing/tiny-random-t5")),
        }
        return self.pipeline_class(**{**parts, **text})

    def test_same(self):
        sizes = {"height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 1, "max_sequence_length": 8}
        assert self.pipe()("dance monkey", **sizes, output_type="pt").frames.shape == (1, 9, 3, 16, 16)

    def test_other(self):
        assert type(self.pipe()) is WanPipeline

    def test_fails_either_way(self):
        assert False

    @pytest.mark.skip(reason="needs an accelerator")
    def test_skipped(self):
        pass
"""


def test_differences():
    stock = {"a": "passed", "b": "failed", "c": "skipped", "d": "passed"}
    packed = {"a": "passed", "b": "failed", "c": "passed"}
    found = [("c", "skipped", "passed"), ("d", "passed", "not run")]
    assert upstream.differences(stock, packed) == found


@pytest.mark.slow
def test_a_suite_is_run_with_and_without(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_theirs.py").write_text(SUITE)
    monkeypatch.setattr(sys, "argv", ["upstream", str(tmp_path), "--select", "test_theirs.py"])
    assert upstream.main() == 1
    told = capsys.readouterr().out
    assert "stock: {'passed': 2, 'failed': 1, 'skipped': 1}, 0 pipelines enabled" in told
    assert "full: {'passed': 1, 'failed': 2, 'skipped': 1}, 4 pipelines enabled" in told
    assert "TestOfTheirs::test_other: passed, with kvpack failed" in told
    assert "1 of 4 tests differ" in told
