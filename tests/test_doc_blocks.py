"""Every Python block of the documents runs as it stands."""

import re
from pathlib import Path

import pytest

from kvpack.shipped import shipped_folder

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def python_blocks(page):
    """Line number and text of each block."""
    text = page.read_text()
    return [(text[: found.start(1)].count("\n"), found[1]) for found in BLOCK.finditer(text)]


WITH_CODE = [page for page in PAGES if python_blocks(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    """A reader's folder has a converted model in it, `my-model`; here it is the pipeline that comes with kvpack."""
    monkeypatch.chdir(tmp_path)
    Path("my-model").symlink_to(shipped_folder())
    names: dict = {"__name__": "__page__"}
    for line, block in python_blocks(page):
        exec(compile("\n" * line + block, str(page), "exec"), names)


def test_blocks_are_found_and_are_python():
    """So that no page goes untested since its fence is written in another way."""
    assert len(WITH_CODE) >= 2
    for page in PAGES:
        fences = re.findall(
            r"^ *(?:```|~~~) *(?:py|python3|Python|pycon)\b|^ +```python|^~~~python", page.read_text(), re.MULTILINE
        )
        assert fences == [], page
        for line, block in python_blocks(page):
            compile("\n" * line + block, str(page), "exec")
