"""`kvpack report`: a page that needs no network, read and looked at in a browser."""

import json
import re
import shutil

import pytest
from hostile import DEEP

from helpers import command, complaint, enable_small, quiet
from kvpack.testing import tiny_wan_pipeline

pytest.importorskip("plotly", reason="kvpack[report] is not installed")
CALL = {"prompt": "a <b>red</b> circle", "height": 32, "width": 32, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Of packforcing, and of a memory that keeps tokens."""
    folder, pipe = tmp_path_factory.mktemp("traces"), quiet(tiny_wan_pipeline())
    for name in ("packforcing", "h2o"):
        enable_small(pipe) if name == "packforcing" else pipe.enable_packforcing(name, chunk_frames=2)
        pipe.packforcing.trace(folder / f"{name}.jsonl")
        for _ in pipe.packforcing.stream(num_frames=77, **CALL):
            pass
    return [folder / "packforcing.jsonl", folder / "h2o.jsonl"]


@pytest.fixture(scope="module")
def page(traces):
    output = traces[0].with_name("report.html")
    assert command("report", *traces, "--output", output).exit_code == 0
    return output


def test_the_page_fetches_nothing(page):
    own = re.sub(r"<script>.*?</script>", "", page.read_text(), count=1, flags=re.DOTALL)  # plotly itself
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", own)
    assert "<b>red" not in own.split("<main>")[1].split("<script>")[0]


def test_a_trace_that_is_not_there_is_told_plainly(tmp_path):
    line = complaint("report", tmp_path / "none.jsonl", "--output", tmp_path / "r.html")
    said = "No such file or directory; give a trace of kvpack generate"
    assert line == f"error: cannot read {tmp_path / 'none.jsonl'}: {said}"


def test_one_trace_and_the_end_of_a_crash(traces, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(traces[0].read_text() + '{"chunk": 99, "fir')
    assert command("report", broken, "--output", tmp_path / "one.html").exit_code == 0


def test_no_text_of_a_trace_ends_the_script(traces, tmp_path):
    """A trace may be a stranger's: what stands in it is shown, and never run."""
    head, first, *rest = traces[0].read_text().splitlines()
    chunk = {**json.loads(first), "picture": "</script><script>STARTS"}
    (tmp_path / "t.jsonl").write_text("\n".join([head, json.dumps(chunk), *rest]))
    assert command("report", tmp_path / "t.jsonl", "--output", tmp_path / "r.html").exit_code == 0
    own = (tmp_path / "r.html").read_text().split("</script>", 1)[1]  # behind plotly itself
    assert "STARTS" in own
    assert "<script>STARTS" not in own


@pytest.mark.parametrize(
    "text", ["", "no json", "[]", "{}", DEEP, '{"stack": "x", "layers": [0], "seconds_a_frame": 1}']
)
def test_what_is_no_trace_is_one_line(text, tmp_path):
    (tmp_path / "t.jsonl").write_text(text)
    assert "a trace" in complaint("report", tmp_path / "t.jsonl", "--output", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_three_are_too_many(traces, tmp_path):
    words = ["report", *traces, traces[0], "--output", tmp_path / "r.html"]
    assert "one trace or two side by side, got 3" in complaint(*words)


def test_the_command_traces(model, tmp_path):
    words = [
        "generate",
        "--model",
        model,
        "--prompt",
        "a fox",
        "--seconds",
        2,
        "--steps",
        1,
        "--width",
        32,
        "--height",
        32,
    ]
    result = command(*words, "--output", tmp_path / "v.mp4", "--trace", tmp_path / "t.jsonl", "--json")
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "t.jsonl").read_text().splitlines()
    assert (
        json.loads(lines[-1])["first_frame"] + json.loads(lines[-1])["frames"]
        == (json.loads(result.stdout)["frames"] - 1) // 4 + 1
    )


@pytest.mark.slow
def test_in_a_browser(page, tmp_path):
    """It hovers, sees the frame of that chunk, switches layers and takes a picture."""
    browser_of = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with browser_of.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1300, "height": 1600}, offline=True)
        faults = []
        tab.on("pageerror", lambda fault: faults.append(fault))
        tab.goto(page.as_uri())
        tab.wait_for_selector("#figure-1-3 .plot-container")
        assert tab.locator(".figure .plot-container").count() == 8
        for trace in (0, 1):
            place = tab.locator(f"#figure-{trace}-0 .nsewdrag").first.bounding_box()
            tab.mouse.move(place["x"] + 0.5 * place["width"], place["y"] + 0.5 * place["height"])
            tab.wait_for_function(f"document.getElementById('when-{trace}').textContent.startsWith('chunk')")
            assert tab.locator(f"#frame-{trace}").get_attribute("src").startswith("data:image/jpeg")
        shown = "document.getElementById('figure-0-0').data.map(each => each.visible)"
        assert tab.evaluate(shown) == [True, False, False]
        tab.mouse.move(1, 1)
        tab.locator("#figure-0-0 .updatemenu-header").click()
        tab.locator("#figure-0-0 .updatemenu-dropdown-button").nth(2).click()
        tab.wait_for_function(f"JSON.stringify({shown}) === '[false,false,true]'")
        tab.set_viewport_size({"width": 400, "height": 1600})  # one column, nothing beside the screen
        tab.wait_for_timeout(300)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400
        tab.screenshot(path=tmp_path / "report.png")
        assert (tmp_path / "report.png").stat().st_size > 10_000
        assert faults == []
        browser.close()
