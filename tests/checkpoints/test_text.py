"""Captions, prompts and configs as editors and browsers write them."""

import json

import pytest

from kvpack.checkpoints.config import Settings
from kvpack.checkpoints.text import prompt_lines, read_lines
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


def test_long_files_of_prompts(tmp_path):
    """A hundred thousand prompts as models extend them are taken; more lines or bytes are to be split."""
    path, line = tmp_path / "prompts.txt", "a" * 600 + "\n"
    path.write_text(line * 100_000)
    assert len(prompt_lines(path)) == 100_000
    path.write_text("a\n" * 100_001)
    with pytest.raises(ValueError, match="has 100001 lines, but prompts have at most 100000; split the file"):
        prompt_lines(path)
    path.write_text("a\n" + "a" * (2**20 + 1))
    with pytest.raises(ValueError, match="line 2 is longer than 1048576 characters"):
        prompt_lines(path)
    with open(path, "wb") as file:
        file.truncate(2**27 + 1)
    with pytest.raises(ValueError, match="has 134217729 bytes, but prompts have at most 134217728; split the file"):
        prompt_lines(path)


def test_configs_with_a_byte_order_mark(tmp_path):
    tiny_wan_pipeline().save_pretrained(tmp_path)
    Settings(fps=12.0).write(tmp_path)
    wanted = from_folder(tmp_path)
    for name in ("model_index.json", "kvpack_config.json", "transformer/config.json", "vae/config.json"):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text())), encoding="utf-8-sig")
    assert from_folder(tmp_path) == wanted
    assert wanted.settings.fps == 12.0
