"""`kvpack plan`: what a video, or training a compressor, will cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli.support import DTYPES, StackName, parse_dtype, parse_options, parse_size, print_json, print_table
from kvpack.errors import InvalidOptionError, UnsupportedPipelineError

if TYPE_CHECKING:
    from kvpack.planning.presets import ModelDescription


def plan(
    preset: Annotated[str | None, typer.Option(help="A well-known model, e.g. wan2.1-t2v-1.3b.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a diffusers pipeline; no weights needed.")] = None,
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels of the video.")] = "832x480",
    seconds: Annotated[float, typer.Option(help="Length of the video.")] = 120.0,
    stack: StackName = None,
    option: Annotated[
        list[str],
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="Option of the stack, e.g. topk=8."),
    ] = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bfloat16",
    fps: Annotated[float | None, typer.Option(help="Frames a second.", show_default="the model's own")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps of a chunk.", show_default="the model's own, else 4")
    ] = None,
    batch: Annotated[int, typer.Option(help="Videos generated together.")] = 1,
    guidance: Annotated[bool, typer.Option("--guidance", help="Classifier-free guidance: two branches.")] = False,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Say whether it fits a card of this memory, and how, e.g. 24.")
    ] = None,
    training: Annotated[bool, typer.Option("--training", help="Training a compressor instead, on 5 s clips.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Say what a video, or training a compressor, will cost: tokens, bytes, operations. Needs no weights."""
    from functools import partial

    described = _described(preset, model)

    from kvpack.cli.tables import fit_rows, plan_rows
    from kvpack.planning import planner
    from kvpack.planning.fit import UMT5_XXL, fit
    from kvpack.planning.presets import adapter_for, text_encoder_config
    from kvpack.plugins.resolve import resolve_stack

    fps = described.settings.fps if fps is None else fps
    steps = int(described.settings.call.get("num_inference_steps", 4)) if steps is None else steps
    if training:
        _plan_training(described, size, stack, parse_options(option), dtype, fps, steps, batch, as_json)
        return
    width, height = parse_size(size)
    configs = described.configs
    adapter = adapter_for(described)
    pixel_frames, latent_frames = planner.video_frames(seconds, fps, adapter.temporal_scale(configs))
    defaults = partial(adapter.default_options, configs)
    memory = resolve_stack(stack, parse_options(option), described.settings, defaults)
    planned = planner.plan(
        adapter.geometry(configs, height, width, parse_dtype(dtype)),
        memory,
        latent_frames,
        batch=batch,
        branches=2 if guidance else 1,
        steps=steps,
        flops=partial(adapter.forward_flops, configs),
        latents=adapter.latent_shape(configs),
    )
    needed = None
    if gpu_memory is not None:
        needed = fit(
            configs,
            UMT5_XXL if model is None else text_encoder_config(model),
            (height, width),
            parse_dtype(dtype),
            chunk_frames=memory.chunk_frames,
            rows=batch,
            kv=planned.resident_kv_bytes,
            archive=planned.archive_kv_bytes if getattr(memory, "tier", "device") == "device" else 0,
        )
    if as_json:
        asked = {"model": described.name, "size": size, "dtype": dtype, "seconds": seconds}
        found = {**asked, "pixel_frames": pixel_frames, **planned.to_dict()}
        if needed is not None and gpu_memory is not None:
            found["fit"] = {**needed.to_dict(), "advice": needed.advice(gpu_memory, planned.archive_blocks)}
        print_json(found)
    else:
        title = f"{described.name}, {size}, {pixel_frames:,} frames at {fps:g} fps, {dtype}"
        print_table(title, ("", memory.name), plan_rows(planned))
        if needed is not None and gpu_memory is not None:
            print_table("on the card, cuDNN's buffers and fragmentation not counted", ("", "bytes"), fit_rows(needed))
            typer.echo(needed.advice(gpu_memory, planned.archive_blocks))


def _plan_training(
    described: "ModelDescription",
    size: str,
    stack: str | None,
    options: dict[str, Any],
    dtype: str,
    fps: float,
    steps: int,
    batch: int,
    as_json: bool,
) -> None:
    from functools import partial

    from kvpack.cli.tables import training_rows
    from kvpack.planning.planner import video_frames
    from kvpack.planning.presets import adapter_for
    from kvpack.plugins.resolve import require_stack, resolve_stack
    from kvpack.training.plan import training_plan

    (width, height), configs, adapter = parse_size(size), described.configs, adapter_for(described)
    latents, cost = adapter.latent_shape(configs), adapter.model_cost(configs, height, width)
    if latents is None or cost is None:
        raise UnsupportedPipelineError(f"the adapter {adapter.name} cannot plan a training yet")
    _, frames = video_frames(5, fps, adapter.temporal_scale(configs))
    memory = require_stack(resolve_stack(stack, {"compressor": "dual", **options}, described.settings))
    planned = training_plan(
        adapter.geometry(configs, height, width, parse_dtype(dtype)),
        memory,
        latents,
        cost,
        partial(adapter.forward_flops, configs),
        frames=frames,
        batch=batch,
        steps=steps,
    )
    if as_json:
        print_json({"model": described.name, "size": size, "dtype": dtype, "frames": frames, **planned.to_dict()})
    else:
        title = f"training, {described.name}, {size}, {frames} latent frames, {dtype}"
        print_table(title, ("", memory.name), training_rows(planned))


def _described(preset: str | None, model: Path | None) -> "ModelDescription":
    from kvpack.checkpoints.config import require_model_folder

    if model is not None and preset is None:
        require_model_folder(model, only=["*.json"])  # before what takes seconds to import

    from kvpack.planning import presets

    if preset is not None and model is None:
        return presets.preset(preset)
    if model is not None and preset is None:
        return presets.from_folder(model)
    given = "neither" if preset is None else "both"
    raise InvalidOptionError(f"give either --preset or --model, got {given}; presets: {', '.join(presets.PRESETS)}")
