"""`kvpack ui`: what its page does without a browser, and the page in one."""

import json
import shutil
import sys
import time
from threading import Thread

import numpy as np
import pytest

from helpers import complaint
from kvpack.cli.ui import view
from kvpack.cli.ui.model import Model
from kvpack.cli.ui.studio import Studio, saved_name, saved_names
from kvpack.cli.ui.view import showing
from kvpack.errors import InvalidOptionError, SnapshotError, UnknownNameError
from kvpack.testing import tiny_skyreels_v2_pipeline

PROMPT = "a red circle bouncing over dusk rings"


@pytest.fixture(scope="module")
def shipped():
    return Model(device="cpu")


#: Blue pixels on the first canvas.
BLUE = """[...Array(4096).keys()].filter(pixel => {
  const data = document.querySelector('canvas').getContext('2d').getImageData(0, 0, 64, 64).data;
  return data[4 * pixel] < 90 && data[4 * pixel + 1] < 120 && data[4 * pixel + 2] > 180;
}).length"""


def begun(model, *memories, seconds=4, seed=0):
    return Studio(model, [model.begin(memory, PROMPT, seconds, seed) for memory in memories])


def pictures(studio, chunks):
    """The frames of the next chunks of the first video, as the page gets them."""
    found = {}
    for _ in range(chunks * len(studio.videos)):
        studio.advance()
        found |= {int(first): each for first, each in showing(studio)["videos"][0]["pictures"].items()}
    return found


def test_two_memories_on_one_seed_go_in_step_to_their_end(shipped):
    studio = begun(shipped, "packforcing:topk=1", "self-forcing", seconds=3)
    one, two = studio.videos
    counts = []
    for _ in studio.chunks(live=False):
        counts.append((one.frames, two.frames))
        assert abs(one.frames - two.frames) <= 16
    assert counts[-1] == (45, 45)
    assert studio.ended
    assert one.pictures[0] == two.pictures[0]  # the same noise, and no past yet
    assert one.held[-1][0] < one.held[-1][1]
    said = view.figures(studio.videos)
    assert "packforcing:topk=1" in said
    assert said.count("<polyline") == 4
    assert said.count("data:image/png") == 2
    assert len(json.dumps(showing(studio))) > 10_000
    studio.close()
    assert not one.trace.exists()


def test_another_prompt_holds_from_the_next_chunk_on(shipped):
    plain, changed = (begun(shipped, "packforcing") for _ in range(2))
    before = [pictures(each, 1) for each in (plain, changed)]
    assert before[0] == before[1]
    changed.say("a blue square bouncing over plain slate")
    after = [pictures(each, 1) for each in (plain, changed)]
    assert after[0][13] != after[1][13]
    assert changed.videos[0].prompts[1] == (13 / 16, "a blue square bouncing over plain slate")
    changed.say("a blue square", cut=True)
    changed.advance()
    assert changed.videos[0].prompts[2][1] == "a blue square (cut)"
    changed.say("a blue square", cut=True)
    changed.say("a green circle")
    changed.advance()
    assert changed.videos[0].prompts[3][1] == "a green circle (cut)"
    for each in (plain, changed):
        each.close()


def test_what_is_saved_goes_on_as_if_it_had_never_stopped(shipped, tmp_path):
    studio = begun(shipped, "packforcing")
    pictures(studio, 2)
    studio.save(tmp_path / "mine")
    assert saved_names(tmp_path) == ["mine"]
    rest = pictures(studio, 2)
    studio.close()
    again = Studio.resume(shipped, tmp_path / "mine")
    assert again.videos[0].first == 29
    assert again.videos[0].prompts == [(0.0, PROMPT)]
    found = pictures(again, 2)
    assert found == {first: rest[first] for first in (29, 45)}
    again.close()
    with pytest.raises(SnapshotError, match="holds no video that was saved by this page"):
        Studio.resume(shipped, tmp_path)


def test_a_fork_is_another_future_beside_it(shipped):
    studio = begun(shipped, "packforcing")
    pictures(studio, 2)
    with pytest.raises(InvalidOptionError, match="seed must be a whole number between"):
        studio.fork(2**64, None)
    assert not studio.paused
    studio.fork(7, "a blue square")
    assert studio.paused
    studio.paused = False
    one, two = studio.videos
    assert (two.first, two.prompts[-1]) == (29, (29 / 16, "a blue square"))
    studio.advance()
    studio.advance()
    assert one.frames == two.frames == 45
    assert one.pictures[29] != two.pictures[29]
    assert [len(each.traced.chunks) for each in (one, two)] == [3, 1]
    with pytest.raises(InvalidOptionError, match="two videos are shown already"):
        studio.fork(1, None)
    assert not studio.paused  # what is refused stops nothing
    studio.close()


def test_a_video_begins_between_two_chunks_of_another(shipped):
    begun = []
    thread = Thread(target=lambda: begun.append(shipped.begin("packforcing", PROMPT, 4, 0)))
    with shipped.lock:  # as while a chunk is made
        thread.start()
        thread.join(0.3)
        assert not begun
    thread.join(20)
    begun[0].stream.close()
    with pytest.raises(InvalidOptionError, match="seed must be a whole number between"):
        shipped.begin("packforcing", PROMPT, 4, 2**64)


def test_what_cannot_begin_ends_nothing(shipped, tmp_path):
    pytest.importorskip("gradio", reason="kvpack[ui] is not installed")
    from kvpack.cli.ui.page import Page

    page, before = Page(shipped, tmp_path), begun(shipped, "packforcing")
    for memory, other in (("packfrocing", "none"), ("packforcing", "packfrocing")):
        with pytest.raises(UnknownNameError):
            page.start(before, "", PROMPT, memory, other, 4, 0)
    with pytest.raises(SnapshotError):
        page.resume(before, "", "nothing")
    assert before.advance()
    after = page.start(before, "", PROMPT, "packforcing", "none", 4, 0)
    assert before.closed
    assert after.videos[0].prompts == [(0.0, PROMPT)]
    after.close()


def test_a_pause_and_whoever_asks_last(shipped):
    studio = begun(shipped, "packforcing")
    first = studio.chunks(live=False)
    next(first)
    second = studio.chunks(live=False)
    next(second)
    assert list(first) == []  # two buttons do not make it twice as fast
    studio.paused = True
    assert list(second) == []
    assert studio.videos[0].frames == 29
    studio.close()
    assert studio.ended


def test_live_is_no_faster_than_it_is_watched(shipped):
    studio = begun(shipped, "packforcing", seconds=0)
    start = time.monotonic()
    for _ in studio.chunks(live=True):
        if studio.made > 3.5:
            break
    assert time.monotonic() - start > 0.7  # the chunk behind second 2.8 waits until 0.8 s are watched
    studio.close()


def test_a_model_of_ones_own(model, tmp_path):
    """Its frames are photographs if they are large, and nobody knows its words."""
    mine = Model(model, "cpu")
    video = mine.begin("streaming-llm", "a fox", 1, 0)
    video.stream.close()
    assert mine.pipeline.__class__.__name__ == "WanPipeline"
    assert mine.unknown_words("a fox") == []
    from kvpack.cli.ui.video import _picture

    assert _picture(np.zeros((200, 200, 3))).startswith("data:image/jpeg")


def test_a_model_that_begins_with_a_picture_is_refused(shipped, tmp_path):
    pytest.importorskip("gradio", reason="kvpack[ui] is not installed")
    from diffusers import SkyReelsV2DiffusionForcingImageToVideoPipeline

    from kvpack.cli.ui.page import Page

    page = Page(shipped, tmp_path)
    tiny_skyreels_v2_pipeline(pipeline_class=SkyReelsV2DiffusionForcingImageToVideoPipeline).save_pretrained(
        tmp_path / "pictures"
    )
    with pytest.raises(InvalidOptionError, match="ImageToVideoPipeline wants image beside a prompt"):
        page.start(None, str(tmp_path / "pictures"), PROMPT, "packforcing", "none", 4, 0)
    assert page.model is shipped


def test_empty_boxes_and_what_is_no_number(shipped, tmp_path):
    gradio = pytest.importorskip("gradio", reason="kvpack[ui] is not installed")
    from kvpack.cli.ui.page import Page, told

    page = Page(shipped, tmp_path)
    studio = page.start(None, "", None, "packforcing", None, None, None)
    assert studio.videos[0].prompts == [(0.0, "")]
    page.say(studio, None)
    studio.advance()
    for wrong, asked in (
        ("give one memory", (page.start, None, "", PROMPT, None, "none", 4, 0)),
        ("a seed is a whole number, got nan", (page.start, None, "", PROMPT, "packforcing", "none", 4, float("nan"))),
        ("a seed is a whole number, got inf", (page.fork, studio, float("inf"), PROMPT)),
        ("a name has letters", (page.save, studio, None)),
    ):
        with pytest.raises(gradio.Error, match=wrong):
            told(asked[0])(*asked[1:])
    assert not studio.paused
    studio.close()


def test_what_is_wrong_is_said(shipped, tmp_path):
    assert shipped.unknown_words("a purple circle") == ["purple"]
    for name in ("", "../up", "a/b", ".hidden", "x" * 61):
        with pytest.raises(InvalidOptionError, match="a name has letters"):
            saved_name(name)
    with pytest.raises(InvalidOptionError, match="give one memory"):
        shipped.begin("", PROMPT, 1, 0)
    studio = begun(shipped, "packforcing")
    with pytest.raises(SnapshotError, match="nothing is made yet"):
        studio.save(tmp_path / "x")
    studio.close()


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'the page needs Gradio; pip install "kvpack[ui]"' in complaint("ui")


@pytest.fixture(scope="module")
def address(shipped, tmp_path_factory):
    pytest.importorskip("gradio", reason="kvpack[ui] is not installed")
    from kvpack.cli.ui.page import opened

    page, url = opened(shipped, tmp_path_factory.mktemp("saved"))
    yield url
    page.close()


def test_an_error_of_any_other_kind_is_shown(address, shipped, monkeypatch):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    monkeypatch.setattr(shipped, "begin", lambda *_: 1 / 0)
    client = Client(address, verbose=False)
    with pytest.raises(AppError, match="division by zero"):
        client.predict("", PROMPT, "packforcing", "none", 4, 0, api_name="/start")


@pytest.fixture
def tab():
    browser_of = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with browser_of.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(20_000)
        yield page
        browser.close()


@pytest.mark.slow
def test_in_a_browser(address, tab):
    """It types a prompt, sees frames move, changes the prompt, stops; by keyboard, and on a narrow screen."""
    faults, outside = [], []
    tab.on("pageerror", lambda fault: faults.append(str(fault)))
    tab.on("request", lambda each: outside.append(each.url) if not each.url.startswith((address, "data:")) else None)
    tab.goto(address)
    tab.get_by_label("Prompt").fill("a green circle bouncing over plain slate")
    tab.get_by_role("button", name="Start").click()
    tab.wait_for_selector("canvas[data-frame]")
    frame = "Number(document.querySelector('canvas').dataset.frame)"
    first = tab.evaluate(frame)
    tab.wait_for_function(f"{frame} > {first} + 8")
    tab.get_by_label("Prompt").fill("a blue square bouncing over plain slate")
    tab.get_by_role("button", name="Change prompt").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.querySelector('.kvp-prompt').textContent.startsWith('a blue square')")
    tab.wait_for_function(BLUE + " > 60")  # the square is there
    assert "looked at" in tab.locator("#beside").inner_text()
    assert tab.locator("#beside img").count() == 1

    state = "[...document.querySelectorAll('label')].find(each => each.innerText.trim() === 'State')"
    state += ".querySelector('textarea, input').value"
    tab.get_by_role("button", name="Pause").click()
    tab.wait_for_function(state + " === 'Paused.'")
    tab.get_by_role("button", name="Save, resume, fork").click()
    tab.get_by_role("button", name="Save", exact=True).click()
    tab.wait_for_function(state + " === 'Saved as my video.'")
    tab.get_by_role("button", name="Fork: two futures side by side").click()
    tab.wait_for_function("document.querySelectorAll('canvas[data-frame]').length === 2")
    tab.get_by_role("button", name="Stop", exact=True).click()
    tab.wait_for_function("!document.querySelector('.kvp-when').value.includes('so far')")

    seek = tab.locator(".kvp-seek")  # watched again by keyboard
    seek.focus()
    tab.keyboard.press("Home")
    tab.wait_for_function(f"{frame} === 0")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function(f"{frame} === 1")

    tab.get_by_role("button", name="Resume", exact=True).click()
    tab.wait_for_function("document.querySelectorAll('canvas[data-frame]').length === 1")
    tab.wait_for_function(state + " === 'Being made.'")

    tab.set_viewport_size({"width": 400, "height": 900})
    tab.wait_for_function("document.documentElement.scrollWidth <= 400")
    assert tab.locator("canvas").first.bounding_box()["y"] < tab.get_by_label("Prompt").bounding_box()["y"]
    assert faults == []
    assert outside == []
