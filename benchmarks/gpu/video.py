"""A stream of a Wan transformer with random weights, its memory filled to any length in seconds."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from benchmarks.gpu.machine import Machine
from benchmarks.report import SEED
from kvpack import Session
from kvpack.adapters.wan.attention import attached
from kvpack.generation import denoiser as denoiser_module
from kvpack.memory.rope import rotate
from kvpack.memory.stack import Stack
from kvpack.planning.presets import PRESETS
from kvpack.plugins.registry import registry

STEPS, TEXT_TOKENS, BRANCH = 4, 512, "cond"
FINISH = "the commit's end: compress, store"
_WIDE = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


@dataclass(frozen=True, eq=False)
class Size:
    """What is generated.

    Args:
        transformer: config of the transformer.
        vae: config of the VAE.
        height: pixels.
        width: pixels.
        frames: latent frames of the past behind which a chunk is measured.
        times: measurements of each figure.
        text: tokens of the prompt.
        backend: of `torch.compile`.
    """

    transformer: dict[str, Any]
    vae: dict[str, Any]
    height: int
    width: int
    frames: int
    times: int
    text: int = TEXT_TOKENS
    backend: str = "inductor"


def _configs(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    configs = PRESETS[name].configs
    vae = {key: value for key, value in configs["vae"].items() if not key.startswith("scale_factor")}
    return dict(configs["transformer"]), vae


#: Two minutes of Wan2.1-1.3B.
WAN = Size(*_configs("wan2.1-t2v-1.3b"), height=480, width=832, frames=480, times=3)
_TINY_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}
_TINY_VAE = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
TINY = Size(_TINY_TRANSFORMER, _TINY_VAE, 64, 64, frames=72, times=1, text=8, backend="eager")


def transformer(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Return one with random weights, in the dtypes that `from_pretrained` gives it."""
    torch.manual_seed(SEED)
    with torch.device(device):
        model = WanTransformer3DModel(**config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if not any(part in _WIDE for part in name.split(".")):
            weight.data = weight.data.to(dtype)
    return model


def vae(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a VAE with random weights."""
    torch.manual_seed(SEED)
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoencoderKLWan(**size.vae).eval().requires_grad_(False)
    return torch.nn.Module.to(model, dtype)


def pipeline(model: Any) -> Any:
    """Return a pipeline without text encoder and VAE, which takes embeddings and gives latents."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    logging.getLogger("kvpack").setLevel(logging.ERROR)  # that random weights are not causal is known
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Held:
    """A layer whose rotated keys and values lie in place; nothing but attention is computed."""

    def __init__(self, turns: Tensor, keys: Tensor, values: Tensor) -> None:
        self.turns, self.keys, self.values = turns, keys, values

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, attention: Any) -> Tensor:
        """Attend them; the chunk's own keys are there already."""
        out: Tensor = attention(rotate(queries, self.turns), self.keys, self.values)
        return out


@dataclass
class Video:
    """A stream whose memory is behind `size.frames` latent frames once it is filled.

    Args:
        pipe: the pipeline.
        machine: where it runs.
        size: what is generated.
        stack: the memory's name.
        options: its options.
    """

    pipe: Any
    machine: Machine
    size: Size
    stack: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipe.enable_packforcing(self.stack, **self.options)
        device, dtype = self.machine.device, self.pipe.transformer.dtype
        text = torch.randn(1, self.size.text, self.pipe.transformer.config.text_dim, device=device, dtype=dtype)
        self.stream = self.pipe.packforcing.stream(
            prompt_embeds=text,
            height=self.size.height,
            width=self.size.width,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            output_type="latent",
            generator=torch.Generator(device).manual_seed(SEED),
        )

    @property
    def denoiser(self) -> Any:
        return self.pipe._kvpack.run.denoiser

    @property
    def session(self) -> Session:
        session: Session = self.pipe.packforcing.sessions[BRANCH]
        return session

    @property
    def frames(self) -> int:
        """Latent frames of a chunk."""
        frames: int = self.session.stack.chunk_frames
        return frames

    def chunk(self) -> Tensor:
        """Return the latents of the next chunk."""
        latents: Tensor = next(self.stream)
        return latents

    def close(self) -> None:
        """Let go of all that it holds."""
        self.stream.close()
        self.pipe.disable_packforcing()

    def fill(self) -> None:
        """Generate the first chunk, and commit random keys and values up to the last chunk but one."""
        self.chunk()
        generator = torch.Generator(self.machine.device).manual_seed(SEED)
        with quickly(self.session):
            while self.session.frames < self.size.frames - self.frames:
                commit_random(self.session, self.machine.device, generator)

    def parts(self) -> tuple[float, dict[str, float]]:
        """Return the seconds of the next chunk, and of each part of it."""
        before = dict(self.denoiser.seconds)
        finish, spent = denoiser_module.finish_commits, [0.0]

        def finished(*given: Any) -> None:
            spent[0] += self.machine.seconds(partial(finish, *given))

        timed = partial(synced, self.machine, self.denoiser.timed)
        finishing = patch.object(denoiser_module, "finish_commits", finished)
        with patch.object(self.denoiser, "timed", timed), finishing:
            whole = self.machine.seconds(self.chunk)
        parts = {name: seconds - before[name] for name, seconds in self.denoiser.seconds.items() if name != "decode"}
        parts = {**parts, "commit": parts["commit"] - spent[0], FINISH: spent[0]}
        return whole, {**parts, "the rest": whole - sum(parts.values())}

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return latents of a chunk, and the time of a denoising step."""
        channels, scale = self.pipe.transformer.config.in_channels, 8
        shape = 1, channels, self.frames, self.size.height // scale, self.size.width // scale
        generator = torch.Generator(self.machine.device).manual_seed(SEED)
        latents = torch.randn(shape, device=self.machine.device, generator=generator)
        return latents.to(self.pipe.transformer.dtype), torch.full((1,), 500.0, device=self.machine.device)

    def denoise(self, step: int) -> Tensor:
        """Return the transformer's output at a denoising step; inside `denoiser.seam()`."""
        output: Tensor = self.denoiser.predict(BRANCH, *self.inputs(), step)
        return output

    def commit(self) -> None:
        """Commit a chunk of noise; inside `denoiser.seam()`."""
        self.denoiser.commit(self.inputs()[0], None)

    def held(self) -> list[Held]:
        """Return rotated keys and values of one layer, in the place of those of every layer; behind a forward."""
        session, found = self.session, []

        def hold(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            found.extend((keys.clone(), values.clone()))
            return queries

        tokens, geometry = self.frames * session.geometry.tokens_per_frame, session.geometry
        like = torch.randn(
            1, tokens, geometry.heads, geometry.head_dim, device=self.machine.device, dtype=geometry.dtype
        )
        (first, *_) = session.denoise(1)
        first.attend(like, like, like, hold)
        cache, plan = session.caches[0], session.plan
        assert plan is not None
        assert cache.attended is not None
        turns = plan.chunk_rotations(cache.attended.chunk_start, self.machine.device)
        return [Held(turns, *found)] * geometry.layers

    def bare(self, held: list[Held]) -> Any:
        """Return a context manager in which the transformer attends what is held."""
        prompted = self.denoiser._prompted()
        return attached(self.denoiser.transformer, lambda branch, step: held, prompted)  # type: ignore[arg-type]


@contextmanager
def synced(machine: Machine, timed: Any, part: str) -> Iterator[None]:
    """Time a part of the work from an idle device to an idle device."""
    machine.sync()
    with timed(part):
        yield
        machine.sync()


@contextmanager
def quickly(session: Session) -> Iterator[None]:
    """Let the memory neither score blocks nor tokens, whose bytes and shapes are the same whatever is chosen."""
    memory = session.stack
    quick: Any = memory
    if isinstance(memory, Stack) and memory.archives:
        chosen = registry().policy("selector", "recency", {"topk": memory.selector.topk})  # type: ignore[attr-defined]
        kept = registry().policy("compressor", "keep-random", {})
        quick = replace(memory, selector=chosen, compressor=kept)
    try:
        for owner, name in ((session, "stack"), *((cache, "memory") for cache in session.caches)):
            setattr(owner, name, quick)
        yield
    finally:
        for owner, name in ((session, "stack"), *((cache, "memory") for cache in session.caches)):
            setattr(owner, name, memory)


def commit_random(session: Session, device: torch.device, generator: torch.Generator) -> None:
    """Commit a chunk of random keys and values, the same in all layers, without a model."""
    geometry = session.geometry
    shape = 3, 1, session.coming_frames * geometry.tokens_per_frame, geometry.heads, geometry.head_dim
    queries, keys, values = torch.randn(shape, device=device, dtype=geometry.dtype, generator=generator)
    for layer in session.commit():
        layer.attend(queries, keys, values, lambda queries, keys, values: queries)
    session.finish_commit()
