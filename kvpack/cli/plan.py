"""`kvpack plan`: what a video, or training a compressor, will cost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli import options
from kvpack.cli.call import call_defaults
from kvpack.cli.support import parse_dtype, parse_options, parse_size, print_json, print_table, refuse_beside
from kvpack.errors import InvalidOptionError, UnsupportedPipelineError

if TYPE_CHECKING:
    from kvpack.planning.budget import Choice
    from kvpack.planning.cards import Placed
    from kvpack.planning.fit import Fit
    from kvpack.planning.planner import Plan
    from kvpack.planning.presets import ModelDescription
    from kvpack.planning.roofline import Roofline

#: Gigabytes that no memory of a finite video holds.
_UNBOUNDED = 1e9


def plan(
    preset: Annotated[str | None, typer.Option(help="A well-known model, e.g. wan2.1-t2v-1.3b.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a diffusers pipeline; no weights needed.")] = None,
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels of the video.")] = "832x480",
    seconds: options.Seconds = 120.0,
    stack: options.StackName = None,
    option: options.Options = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help=", ".join(options.DTYPES))] = "bfloat16",
    fps: options.Fps = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps of a chunk.", show_default="the model's own, else 4")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Videos generated together.")] = 1,
    guidance: Annotated[
        bool | None,
        typer.Option(
            help="Classifier-free guidance: two branches.",
            show_default="as the model's own call; of a preset without one, one branch",
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Say whether it fits a card of this memory, and how, e.g. 24.")
    ] = None,
    budget_gb: Annotated[
        float | None, typer.Option(metavar="GB", help="Choose options so that the memory holds at most this, e.g. 4.")
    ] = None,
    cards: Annotated[bool, typer.Option("--cards", help="Say how it fits cards of 8 to 80 GiB.")] = False,
    weights: Annotated[
        str | None,
        typer.Option(help="Quantised linear layers: int8 or int4, by diffusers' quantization_config."),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="10^12 operations a second of a card, for the seconds of a chunk.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="And 10^9 bytes a second of its memory, e.g. 2000.")] = None,
    training: Annotated[bool, typer.Option("--training", help="Training a compressor instead, on 5 s clips.")] = False,
    as_json: options.Json = False,
) -> None:
    """Say what a video, or training a compressor, will cost: tokens, bytes, operations. Needs no weights."""
    if (tflops is None) != (bandwidth is None):
        raise InvalidOptionError("seconds of a chunk need both --tflops and --bandwidth, e.g. 400 and 2000")
    described = _described(preset, model)

    from kvpack.memory.costs import channels_of
    from kvpack.planning import planner
    from kvpack.planning.budget import Budget
    from kvpack.planning.cards import CARDS, place
    from kvpack.planning.fit import UMT5_XXL, fit
    from kvpack.planning.presets import adapter_for, text_encoder_config
    from kvpack.planning.resident import passing
    from kvpack.planning.roofline import roofline
    from kvpack.plugins.resolve import named_stack, resolve_stack

    fps = described.settings.fps if fps is None else fps
    steps = int(described.settings.call.get("num_inference_steps", 4)) if steps is None else steps
    if training:
        others = {"--gpu-memory": gpu_memory, "--budget-gb": budget_gb, "--weights": weights, "--tflops": tflops}
        others |= {"--bandwidth": bandwidth, "--cards": cards or None, "--guidance": guidance or None}
        refuse_beside("--training", others)
        _plan_training(described, size, stack, parse_options(option), dtype, fps, steps, batch, as_json)
        return
    width, height = parse_size(size)
    configs = described.configs
    adapter = adapter_for(described)
    pixel_frames, latent_frames = planner.video_frames(seconds, fps, adapter.temporal_scale(configs))
    defaults = partial(adapter.default_options, configs)
    wanted = stack, parse_options(option), described.settings, defaults
    asked, named = resolve_stack(*wanted), named_stack(*wanted)
    geometry, latents = adapter.geometry(configs, height, width, parse_dtype(dtype)), adapter.latent_shape(configs)
    guided = _guided(described.settings.call, model) if guidance is None else guidance
    branches, chunks = 2 if guided else 1, -(-latent_frames // asked.chunk_frames)
    most = _UNBOUNDED if budget_gb is None else budget_gb

    def choose(gigabytes: float) -> "Choice":
        budget, channels = Budget(min(gigabytes, most), named), channels_of(latents)
        return budget.choice(asked, geometry, chunks, batch=batch, branches=branches, channels=channels)

    choice = choose(most)
    needed, speed, card = None, None, None
    all_cards: list[Placed] = []
    if gpu_memory is not None or cards or tflops is not None or weights is not None:
        text = UMT5_XXL if model is None else text_encoder_config(model)
        precision, frames = parse_dtype(dtype), asked.chunk_frames
        needed = fit(configs, text, (height, width), precision, chunk_frames=frames, rows=batch, weights=weights)
        copies, kept = passing(geometry, asked, batch * branches, steps)
        needed = replace(needed, copies=copies, passing=kept)
        placed = partial(place, needed, choose=choose, held=choice.held_bytes)
        card = None if gpu_memory is None else placed(gpu_memory)
        all_cards = [placed(each) for each in CARDS] if cards else []
        if card is not None and card.choice is not None:
            choice = card.choice
        needed = replace(needed, kv=choice.held_bytes)
    planned = planner.plan(
        geometry,
        choice.memory,
        latent_frames,
        batch=batch,
        branches=branches,
        steps=steps,
        flops=partial(adapter.forward_flops, configs),
        latents=latents,
    )
    if needed is not None and tflops is not None and bandwidth is not None:
        forwards = steps + (choice.memory.commit == "rerun")
        speed = roofline(planned, forwards, branches, needed.transformer, tflops, bandwidth)
    answer = _Answer(planned, choice, budget_gb is not None, needed, card, all_cards, speed)
    if as_json:
        given = {"model": described.name, "size": size, "dtype": dtype, "seconds": seconds}
        print_json({**given, "pixel_frames": pixel_frames, **answer.to_dict()})
    else:
        answer.print(f"{described.name}, {size}, {pixel_frames:,} frames at {fps:g} fps, {dtype}")


def _guided(call: Mapping[str, Any], model: Path | None) -> bool:
    """Return whether a model's own call has guidance, as `kvpack generate` would make it; stock presets have none."""
    scale = {**({} if model is None else call_defaults(model)), **call}.get("guidance_scale")
    return isinstance(scale, int | float) and scale > 1


@dataclass(frozen=True)
class _Answer:
    """What the command says of the chosen memory, and of that card and those cards that were asked for."""

    plan: "Plan"
    choice: "Choice"
    budgeted: bool
    fit: "Fit | None"
    card: "Placed | None"
    cards: "list[Placed]"
    speed: "Roofline | None"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        changes, lines = dict(self.choice.changes), list(self.choice.lines)
        found = self.plan.to_dict()
        found["budget"] = {"changes": changes, "held_bytes": self.choice.held_bytes, "lines": lines}
        if self.fit is not None:
            found["fit"] = self.fit.to_dict() | ({} if self.card is None else {"advice": self.card.advice})
        if self.cards:
            found["cards"] = {f"{each.gpu_memory:g}": each.advice for each in self.cards}
        if self.speed is not None:
            found["roofline"] = self.speed.to_dict()
        return found

    def print(self, title: str) -> None:
        """Print tables, and what was chosen."""
        from kvpack.cli.tables import card_rows, fit_rows, plan_rows, roofline_row

        rows = plan_rows(self.plan)
        print_table(title, ("", self.plan.stack), rows if self.speed is None else [*rows, roofline_row(self.speed)])
        for line in str(self.choice).splitlines() if self.budgeted else self.choice.lines:
            typer.echo(line)
        if self.fit is not None:
            heading, tier = "on the card, cuDNN's buffers and fragmentation not counted", self.choice.tier
            print_table(heading, ("", "bytes"), fit_rows(self.fit, self.plan, tier))
        if self.card is not None:
            typer.echo(self.card.advice)
        if self.cards:
            print_table("cards", ("card", "how", "options changed", "KV", "in all"), card_rows(self.cards))


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
