"""Captions, prompts and configs as editors and browsers write them."""

import json

import pytest

from kvpack.checkpoints.config import Settings
from kvpack.checkpoints.text import read_lines
from kvpack.evaluation.vbench import read_prompts
from kvpack.planning.presets import from_folder
from kvpack.testing import tiny_wan_pipeline
from kvpack.training.clips import _captions

TEXTS = {
    "a byte order mark": (b"\xef\xbb\xbfa red circle\n", ["a red circle"]),
    "a line separator inside": ("a red\u2028circle\nblue\n".encode(), ["a red\u2028circle", "blue"]),
    "a paragraph separator inside": ("a red\u2029circle\n".encode(), ["a red\u2029circle"]),
    "a next line inside": ("a red\x85circle\nblue".encode(), ["a red\x85circle", "blue"]),
    "a form feed inside": (b"a red\x0ccircle\n", ["a red\x0ccircle"]),
    "lines of Windows": (b"\xef\xbb\xbfa red circle\r\n\r\n blue \r\n", ["a red circle", "blue"]),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_line_is_a_caption_and_a_prompt(text, tmp_path):
    data, lines = TEXTS[text]
    (tmp_path / "clip.txt").write_bytes(data)
    assert read_lines(tmp_path / "clip.txt") == lines
    assert _captions(tmp_path / "clip.mp4") == lines
    assert read_prompts(tmp_path / "clip.txt") == lines


def test_configs_with_a_byte_order_mark(tmp_path):
    tiny_wan_pipeline().save_pretrained(tmp_path)
    Settings(fps=12.0).write(tmp_path)
    wanted = from_folder(tmp_path)
    for name in ("model_index.json", "kvpack_config.json", "transformer/config.json", "vae/config.json"):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text())), encoding="utf-8-sig")
    assert from_folder(tmp_path) == wanted
    assert wanted.settings.fps == 12.0
