"""`kvpack train-compressor`: trains what compresses the memory of a model of one's own."""

from pathlib import Path
from typing import Annotated

import typer

from kvpack.cli import options
from kvpack.cli.support import parse_options, parse_size, print_json
from kvpack.errors import InvalidOptionError


def train_compressor(
    model: Annotated[Path, typer.Option(help="Folder of a diffusers pipeline; it stays as it is.")],
    data: Annotated[
        Path, typer.Option(help="Folder of videos, or of latents in .safetensors; captions in .txt of the same name.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the run; a run that was stopped goes on from it.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 3000,
    learning_rate: Annotated[float, typer.Option(help="Of the compressor.")] = 1e-4,
    batch: Annotated[int, typer.Option(help="Clips a backward pass, in each process.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Backward passes a step.")] = 1,
    schedule: Annotated[str, typer.Option(help="Of the learning rate: constant, cosine, linear, ...")] = "constant",
    warmup: Annotated[int, typer.Option(help="Steps until the learning rate is reached.")] = 0,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of a step's gradient.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the weights, the order of clips and all noise.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    stack: options.StackName = None,
    option: options.Options = [],  # noqa: B006  # typer reads it, nobody changes it
    branches: Annotated[str, typer.Option(help="dual (both branches) or hr (the learned one alone).")] = "dual",
    project: Annotated[
        str, typer.Option(help="layers (through the whole model) or direct (each layer's own projections).")
    ] = "layers",
    hidden: Annotated[int, typer.Option(help="Channels between the convolutions.")] = 64,
    initial: Annotated[str | None, typer.Option(help="Folder or Hub id of trained weights to go on from.")] = None,
    frames: Annotated[int, typer.Option(help="Latent frames of a clip.")] = 20,
    size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Pixels that videos are cut to, and that latents must be of."),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second that it was trained with.", show_default="the model's own")
    ] = None,
    denoising_steps: Annotated[int, typer.Option(help="Denoising steps of a chunk.")] = 4,
    chunks: Annotated[int, typer.Option(help="Chunks of a clip that are learned from at once.")] = 1,
    max_sequence_length: Annotated[int | None, typer.Option(help="Text tokens; the pipeline's own default.")] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Bidirectional pipeline: train by distribution matching, as the paper does.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Train LoRA weights of the model too; needs --teacher.")] = 0,
    critic_steps: Annotated[int, typer.Option(help="Steps of the critic for one of the compressor.")] = 5,
    guidance_scale: Annotated[float, typer.Option(help="Of the teacher.")] = 3.0,
    broken: Annotated[str, typer.Option(help="What a clip that cannot be used does: stop or skip.")] = "stop",
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave a GPU alone.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log for TensorBoard beside log.csv.")] = False,
    base_model: Annotated[str | None, typer.Option(help="What the saved config calls the model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a compressor for a model, which stays frozen; `accelerate launch -m kvpack` for several processes.

    Without --teacher, what the model predicts behind packed history learns to be what it predicts behind all of it.
    """
    from kvpack.checkpoints.hub import model_folder

    model_folder(model)  # before what takes seconds to import
    if not data.is_dir():
        raise InvalidOptionError(f"no data folder {data}; give a folder of videos or of latents")
    if not 0 <= seed < 2**32:  # NumPy is seeded too
        raise InvalidOptionError(f"--seed must be between 0 and 2^32 - 1, got {seed}")

    from kvpack.training.compressor import CompressorTraining
    from kvpack.training.recipe import TrainingRecipe

    recipe = TrainingRecipe(steps, learning_rate, batch, accumulation, schedule, warmup, clip_norm, seed, save_every)
    width_height = None if size is None else parse_size(size)
    branch = CompressorTraining(
        model=model,
        data=data,
        output=output,
        stack=stack,
        options=parse_options(option),
        branches=branches,  # type: ignore[arg-type]  # checked where it is used
        project=project,  # type: ignore[arg-type]
        hidden=hidden,
        initial=initial,
        teacher=teacher,
        lora_rank=lora_rank,
        critic_steps=critic_steps,
        guidance_scale=guidance_scale,
        frames=frames,
        size=width_height and (width_height[1], width_height[0]),
        fps=fps,
        denoising_steps=denoising_steps,
        chunks=chunks,
        broken=broken,  # type: ignore[arg-type]
        max_sequence_length=max_sequence_length,
        mixed_precision=mixed_precision,
        cpu=cpu,
        tensorboard=tensorboard,
        base_model=base_model,
        recipe=recipe,
    ).run()
    parameters = sum(each.numel() for each in branch.parameters())
    if as_json:
        print_json({"output": str(output), "steps": steps, "parameters": parameters})
    else:
        typer.echo(f"wrote {output}: {parameters:,} parameters. enable_packforcing(compressor={str(output)!r})")
