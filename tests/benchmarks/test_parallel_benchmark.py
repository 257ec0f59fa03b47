"""The count of bytes on paper is that of the documents, and the kept figures are within their bars."""

from pathlib import Path

from benchmarks import beside, parallel, report
from helpers import told

PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"
NVLINK, PCIE, FLOPS = 450e9, 25e9, 400e12


def test_the_kept_figures_are_within_their_bars():
    rows = report.read(report.RESULTS / "parallel.json")
    assert all(bar.verdict(rows).startswith("met ") for bar in parallel.BARS)
    assert all(row.value > 0 for row in rows if row.metric == "choices" and row.subject.startswith("packforcing"))
    assert all(bar.verdict(report.read(report.RESULTS / "beside.json")).startswith("met ") for bar in beside.BARS)


def test_the_table_of_the_page_is_what_is_planned():
    lines = PAGE.read_text().split("| model | GPUs |")[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]
    assert len(rows) == 6
    for model, gpus, held, sent, nvlink, pcie in rows:
        ranks = int(gpus)
        layers, heads = {"1.3B": (30, 12), "14B": (40, 40)}[model]
        planned = told("plan", "--preset", f"wan2.1-t2v-{model.lower()}", "--seconds", 120, "--json")
        crossing = parallel.attention_bytes(layers, heads * 128, 5 * planned["chunk_tokens"], ranks, 2)
        working = planned["flops_per_chunk"] / FLOPS / ranks
        left = [round(100 * working / (working + crossing / link)) for link in (NVLINK, PCIE)]
        assert held == f"{planned['resident_kv_bytes'] / ranks / 1e9:.1f} GB"
        assert sent == f"{crossing / 1e9:.2f} GB"
        assert [nvlink, pcie] == [f"{each} %" for each in left]
