"""The notebooks run from their first cell to their last, and hold no output in the repository."""

import json
from pathlib import Path

import pytest

BOOKS = sorted((Path(__file__).parent.parent / "examples/notebooks").glob("*.ipynb"))


def test_there_are_two_without_outputs():
    assert len(BOOKS) == 2
    for path in BOOKS:
        code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert len(code) >= 3
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), path.name


@pytest.mark.slow
@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    book = nbformat.read(path, as_version=4)
    client(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert told
    assert {output.output_type for output in told} <= {"execute_result", "stream", "display_data"}
    kinds = {kind for output in told for kind in output.get("data", {})}
    assert ("image/png" in kinds) == (path.stem == "first_video")
