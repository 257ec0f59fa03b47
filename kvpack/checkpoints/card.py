"""The model card of a converted checkpoint: what it was made of, and how it is used."""

from pathlib import Path

from kvpack.checkpoints.recipes import Recipe
from kvpack.version import __version__

FILE = "README.md"


def model_card(recipe: Recipe, source: Path, base: Path, lora: Path | None, name: str) -> str:
    """Return the text of a card as the Hub reads it; names of files and no paths of this machine.

    `source` is the checkpoint, `base` the folder or Hub id of the model that it was made of, and `name` that of the
    converted folder.
    """
    from huggingface_hub import ModelCardData

    settings, on_the_hub = recipe.settings, not base.is_dir()
    about = ModelCardData(
        base_model=str(base) if on_the_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-video",
        tags=["kvpack", "text-to-video", "causal-video"],
    )
    options = ", ".join(f"{option}={value}" for option, value in settings.options.items())
    call = ", ".join(f"{argument}={value}" for argument, value in settings.call.items())
    merged = [f"| LoRA, merged | `{lora.name}` |"] if lora is not None else []
    note = ["", f"Note: {recipe.note}."] if recipe.note else []
    lines = [
        "---",
        about.to_yaml(),
        "---",
        "",
        f"# {name}",
        "",
        f"A causal video model, converted by kvpack {__version__} for diffusers. Its weights, and their",
        f"licence, are those of {recipe.source}.",
        "",
        "| | |",
        "|---|---|",
        f"| checkpoint | `{source.name}`, recipe `{recipe.name}` |",
        f"| base | `{base if on_the_hub else base.resolve().name}` |",
        *merged,
        f"| memory | `{settings.stack}`: {options} |",
        f"| call | {call}; {settings.fps:g} frames a second |",
        *note,
        "",
        "```python",
        "import kvpack  # before from_pretrained: the scheduler may be kvpack's",
        "from diffusers import WanPipeline",
        "",
        f'pipe = WanPipeline.from_pretrained("{name}")',
        "pipe.enable_packforcing()  # what kvpack_config.json says",
        'video = pipe("a fox runs", num_frames=957).frames[0]',
        "```",
    ]
    return "\n".join(lines) + "\n"
