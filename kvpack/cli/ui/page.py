"""The page itself: its parts, and what happens when a button is pressed. The only module that needs Gradio."""

from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from kvpack.cli.support import in_one_line, page_file
from kvpack.cli.ui import view
from kvpack.cli.ui.model import Model
from kvpack.cli.ui.studio import Studio, saved_name, saved_names
from kvpack.errors import InvalidOptionError, KVPackError
from kvpack.plugins.registry import registry

PROMPT = "a red circle bouncing over dusk rings"
_NONE = "none"
_TITLE = "# kvpack\nA video is made chunk by chunk, and watched meanwhile. Ask it for something else at any time."
_WORDS = (
    "The tiny model knows these words. Colours: red, green, blue, yellow, magenta, cyan, orange, white. "
    "Shapes: circle, square, triangle. Backgrounds: night stripes, dark checks, dusk rings, plain slate."
)
#: On a narrow screen the video comes first.
STYLE = "@media (max-width: 700px) { .kvp-first { order: -1; } }"


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show an error of kvpack on the page, in its one line."""

    @wraps(function)
    def call(*given: Any) -> Any:
        try:
            return function(*given)
        except KVPackError as error:
            raise gr.Error(in_one_line(error), print_exception=False) from error

    return call


class Page:
    """What the buttons do. A visitor's `Studio` is in Gradio's state; the model is everybody's."""

    def __init__(self, model: Model, saved: Path) -> None:
        self.model, self.saved = model, saved

    def model_of(self, folder: str) -> Model:
        """Return the model of a folder; the one before is let go."""
        path = Path(folder.strip()) if folder.strip() else None
        if path != self.model.folder:
            self.model = Model(path, self.model.device)
        return self.model

    def start(
        self,
        before: Studio | None,
        folder: str,
        prompt: str | None,
        memory: str | None,
        other: str | None,
        seconds: float | None,
        seed: float | None,
    ) -> Studio:
        """Begin one video, or two with the same noise; the one before ends as soon as they have begun."""
        model, prompt, memory = self.model_of(folder), prompt or "", memory or ""
        if unknown := model.unknown_words(prompt):
            gr.Warning(f"the tiny model does not know {', '.join(unknown)}")
        names = [memory] if not other or other == _NONE else [memory, other]
        studio = Studio(model, [])
        try:
            for name in names:
                studio.videos.append(model.begin(name, prompt, seconds or 0, seed_of(seed)))
        except KVPackError:
            studio.close()
            raise
        close(before)
        return studio

    def watch(self, studio: Studio | None, live: bool) -> Iterator[tuple[Any, ...]]:
        """Make chunks, and show each."""
        if studio is None:
            return
        studio.paused = False
        yield self.shown(studio)
        try:
            for _ in studio.chunks(live):
                yield self.shown(studio)
        except KVPackError as error:
            raise gr.Error(in_one_line(error), print_exception=False) from error
        yield self.shown(studio)

    def shown(self, studio: Studio) -> tuple[Any, ...]:
        """Return what the player, the figures and the line of state show."""
        state = "The end." if studio.ended else "Paused." if studio.paused else "Being made."
        return view.showing(studio), view.figures(studio.videos), state

    def pause(self, studio: Studio | None) -> None:
        """Make nothing more for the moment."""
        required(studio).paused = True

    def say(self, studio: Studio | None, prompt: str | None) -> str:
        """Go on under another prompt."""
        running = required(studio)
        if unknown := running.model.unknown_words(prompt or ""):
            gr.Warning(f"the tiny model does not know {', '.join(unknown)}")
        running.say(prompt)
        return "The new prompt holds from the next chunk on."

    def cut(self, studio: Studio | None, prompt: str | None) -> str:
        """Begin another scene."""
        required(studio).say(prompt, cut=True)
        return "Another scene begins with the next chunk."

    def stop(self, studio: Studio | None) -> tuple[Any, ...]:
        """End the videos; they can still be watched."""
        running = required(studio)
        running.close()
        return self.shown(running)

    def save(self, studio: Studio | None, name: str | None) -> tuple[Any, str]:
        """Save the videos under a name."""
        folder = self.saved / saved_name(name or "")
        required(studio).save(folder)
        return gr.Dropdown(choices=saved_names(self.saved), value=folder.name), f"Saved as {folder.name}."

    def resume(self, before: Studio | None, folder: str, name: str | None) -> Studio:
        """Go on with saved videos; those before end as soon as these are read."""
        studio = Studio.resume(self.model_of(folder), self.saved / saved_name(name or ""))
        close(before)
        return studio

    def fork(self, studio: Studio | None, seed: float | None, prompt: str | None) -> Studio:
        """Put another future beside the video: other noise, and the prompt in the box."""
        running = required(studio)
        said = running.videos[0].prompts
        return running.fork(seed_of(seed), prompt if said and prompt != said[-1][1] else None)


def seed_of(number: float | None) -> int:
    """Return what the box of a seed holds; nothing is 0.

    Raises:
        InvalidOptionError: if it is no number.
    """
    try:
        return int(number or 0)
    except (ValueError, OverflowError) as error:
        raise InvalidOptionError(f"a seed is a whole number, got {number}") from error


def required(studio: Studio | None) -> Studio:
    """Return the videos that are being made, or say on the page that there are none."""
    if studio is None or studio.closed:
        raise gr.Error("Nothing is being made; press Start first.", print_exception=False)
    return studio


def close(studio: Studio | None) -> None:
    """End what a visitor who has gone left behind."""
    if studio is not None:
        studio.close()


def build(model: Model, saved: Path) -> gr.Blocks:
    """Return the page."""
    page, names = Page(model, saved), registry().names("stack")
    free: dict[str, Any] = {"allow_custom_value": True, "min_width": 130}  # a memory may have options
    with gr.Blocks(title="kvpack", analytics_enabled=False, fill_width=True) as blocks:
        studio = gr.State(None, delete_callback=close)
        gr.Markdown(_TITLE)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, info=None if model.folder else _WORDS)
                with gr.Row():
                    change = gr.Button("Change prompt", min_width=110, size="md")
                    cut = gr.Button("Cut to it", min_width=110, size="md")
                with gr.Row():
                    memory = gr.Dropdown(names, value=model.own, label="Memory", **free)
                    other = gr.Dropdown([_NONE, *names], value=_NONE, label="Beside it", **free)
                with gr.Row():
                    seconds = gr.Number(30, label="Seconds (0: no end)", minimum=0, min_width=100)
                    seed = gr.Number(0, label="Seed", precision=0, min_width=100)
                with gr.Row():
                    begin = gr.Button("Start", variant="primary", min_width=64, size="md")
                    pause = gr.Button("Pause", min_width=64, size="md")
                    go_on = gr.Button("Go on", min_width=64, size="md")
                    stop = gr.Button("Stop", variant="stop", min_width=64, size="md")
                state = gr.Textbox("Nothing is made yet.", label="State", interactive=False)
                live = gr.Checkbox(True, label="Make it no faster than it is watched")
                with gr.Accordion("Save, resume, fork", open=False):
                    name = gr.Textbox("my video", label="Name")
                    save = gr.Button("Save")
                    known = gr.Dropdown(saved_names(saved), label="Saved videos", allow_custom_value=True)
                    resume = gr.Button("Resume")
                    other_seed = gr.Number(1, label="Seed of the other future", precision=0)
                    fork = gr.Button("Fork: two futures side by side")
                folder = gr.Textbox(
                    str(model.folder or ""), label="Model folder", info="Empty: the tiny model that comes with kvpack."
                )
            with gr.Column(scale=3, min_width=290, elem_classes="kvp-first"):
                screen = gr.HTML(
                    view.showing(None),
                    html_template=page_file("player.html"),
                    css_template=page_file("player.css"),
                    js_on_load=page_file("player.js"),
                    elem_id="screen",
                )
            with gr.Column(scale=2, min_width=290):
                beside = gr.HTML(view.figures([]), css_template=page_file("view.css"), elem_id="beside")
        shown, watching = [screen, beside, state], {"show_progress": "hidden", "concurrency_limit": 4}

        def then_watch(event: Any) -> None:
            event.success(page.watch, [studio, live], shown, **watching)

        asked = [folder, prompt, memory, other, seconds, seed]
        then_watch(begin.click(told(page.start), [studio, *asked], studio, show_progress="hidden"))
        then_watch(resume.click(told(page.resume), [studio, folder, known], studio, show_progress="hidden"))
        then_watch(fork.click(told(page.fork), [studio, other_seed, prompt], studio, show_progress="hidden"))
        go_on.click(page.watch, [studio, live], shown, **watching)
        pause.click(told(page.pause), studio, None, show_progress="hidden")
        gr.on([change.click, prompt.submit], told(page.say), [studio, prompt], state, show_progress="hidden")
        cut.click(told(page.cut), [studio, prompt], state, show_progress="hidden")
        stop.click(told(page.stop), studio, shown, show_progress="hidden")
        save.click(told(page.save), [studio, name], [known, state], show_progress="hidden")
    return blocks


def opened(model: Model, saved: Path, **given: Any) -> tuple[gr.Blocks, str]:
    """Serve the page from a thread of its own, with arguments of Gradio's `launch`; return it and its address."""
    page, plain = build(model, saved).queue(), gr.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    usual = {"prevent_thread_lock": True, "quiet": True, "show_error": True, "footer_links": [], "ssr_mode": False}
    _, address, _ = page.launch(css=STYLE, theme=plain, **{**usual, **given})
    return page, address
