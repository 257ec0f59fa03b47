"""`kvpack convert`: a research checkpoint becomes a diffusers folder."""

from pathlib import Path
from typing import Annotated

import typer

from kvpack.cli import options
from kvpack.cli.support import parse_dtype, print_json, print_table
from kvpack.errors import InvalidOptionError


def convert(
    source: Annotated[
        Path, typer.Argument(help="Checkpoint: .safetensors, .pt, .pth, .bin, .ckpt or a folder of shards.")
    ],
    base: Annotated[
        Path, typer.Option(help="Diffusers folder of the same model, or one with its transformer's config.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    recipe: Annotated[
        str | None, typer.Option(help="Which known checkpoint it is.", show_default="what the source's path tells")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Where in the checkpoint.", show_default="generator_ema, generator, ..."),
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA to merge: a file, or a folder of PEFT.")] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(help="Strength of the LoRA.", show_default="the file's, else the rank"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=", ".join(options.DTYPES), show_default="the checkpoint's")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of the transformer.")] = "5GB",
    causal: Annotated[
        bool, typer.Option("--causal", help="The weights are causal, though their path is that of some that are not.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False,
    as_json: options.Json = False,
) -> None:
    """Make a diffusers folder of a causal Wan checkpoint, with the scheduler, chunk length and memory that it needs."""
    if not source.exists():  # before what takes seconds to import
        raise InvalidOptionError(f"no checkpoint {source}; give a file or a folder of shards")

    from kvpack.checkpoints.convert import convert as run
    from kvpack.checkpoints.recipes import recipe_for
    from kvpack.plugins.registry import registry

    known = recipe_for(source, recipe, causal or lora is not None)  # a LoRA may make them causal
    done = run(
        source,
        base,
        output,
        known,
        *registry().adapters["wan"].checkpoint_layout(),
        weights=weights,
        lora=lora,
        lora_alpha=lora_alpha,
        dtype=None if dtype is None else parse_dtype(dtype),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    notes = [known.note] * bool(known.note)
    if known.lora and lora is None:
        notes.append(f"{known.name} is a base and a LoRA, and no --lora was given")
    if as_json:
        print_json({"recipe": known.name, "source": known.source, "output": str(output), **done, "notes": notes})
        return
    settings, counted = known.settings, f"{done['tensors']:,} tensors, {done['parameters']:,} numbers"
    rows = [
        ("recipe", f"{known.name} ({known.source})"),
        ("weights", f"{' > '.join(done['nesting']) or 'all'}: {counted}"),
        ("LoRA", f"{done['merged']} weights merged"),
        ("memory", f"{settings.stack}, " + ", ".join(f"{name}={value}" for name, value in settings.options.items())),
        ("sampler", f"sigmas {', '.join(f'{sigma:g}' for sigma in known.sigmas)}, shift {known.shift:g}"),
        ("call", ", ".join(f"{name}={value}" for name, value in settings.call.items())),
        ("copied from the base", ", ".join(done["copied"]) or "nothing"),
        ("not in the base", ", ".join(done["absent"]) or "nothing"),
        *(("note", note) for note in notes),
    ]
    print_table(f"wrote {output}", ("", known.name), rows)
