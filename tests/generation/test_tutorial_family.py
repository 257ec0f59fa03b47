"""A family from the ground up: a causal model of another shape than the built-in ones, and all that supports it."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils import BaseOutput
from torch import nn

import kvpack
from kvpack.adapters.attention import PackedAttnProcessor, attached, paired
from kvpack.adapters.compatibility import check_placement
from kvpack.errors import InvalidOptionError, UnsupportedPipelineError, require_int
from kvpack.generation.adapter import Adapter
from kvpack.generation.chunks import with_chunk_frames
from kvpack.generation.denoiser import Denoiser
from kvpack.generation.run import Run
from kvpack.memory.blocks import grid_coordinates
from kvpack.memory.geometry import Geometry
from kvpack.plugins.registry import registry
from kvpack.testing import check_adapter

SPLIT, TEXT = (4, 4, 4), 8


# The model and its pipeline, which know nothing of kvpack


class ToyAttnProcessor:
    """Attends all tokens under a mask, rotated by halves."""

    _attention_backend = None

    def __call__(self, attn, hidden, angles, mask):
        query, key, value = (each.unflatten(2, (attn.heads, -1)) for each in attn.qkv(hidden).chunk(3, dim=-1))
        query, key = (turned(attn.norm(each), angles) for each in (query, key))
        return attn.out(dispatch_attention_fn(query, key, value, attn_mask=mask).flatten(2))


def turned(vectors, angles):
    cos, sin = angles.cos()[:, None].float(), angles.sin()[:, None].float()  # (tokens, 1, head_dim / 2)
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class ToyAttention(nn.Module):
    def __init__(self, heads, head_dim):
        super().__init__()
        self.heads, self.processor = heads, ToyAttnProcessor()
        self.qkv, self.out = (
            nn.Linear(heads * head_dim, 3 * heads * head_dim),
            nn.Linear(heads * head_dim, heads * head_dim),
        )
        self.norm = nn.RMSNorm(head_dim)

    def set_processor(self, processor):
        self.processor = processor

    def forward(self, hidden, angles, mask):
        return self.processor(self, hidden, angles=angles, mask=mask)


class ToyTransformer(ModelMixin, ConfigMixin):
    """Predicts a velocity; a chunk attends itself and the chunks before it."""

    @register_to_config
    def __init__(self, num_layers=3, heads=2, head_dim=12, channels=4, grid=(2, 3), chunk_frames=2):
        super().__init__()
        width = heads * head_dim
        self.embed, self.text, self.time = nn.Linear(channels, width), nn.Linear(TEXT, width), nn.Linear(1, width)
        self.layers = nn.ModuleList(ToyAttention(heads, head_dim) for _ in range(num_layers))
        self.out = nn.Linear(width, channels)

    def forward(self, latents, times, text):  # (b, c, f, h, w), (b, f), (b, 1, TEXT)
        frames, grid = latents.shape[2], tuple(latents.shape[3:])
        places, each = grid_coordinates(frames, grid).double(), grid[0] * grid[1]
        powers = [10000.0 ** -(torch.arange(0, width, 2).double() / width) for width in SPLIT]
        angles = torch.cat([places[:, axis, None] * power for axis, power in enumerate(powers)], dim=1)
        chunk = places[:, 0] // self.config.chunk_frames
        hidden = self.embed(latents.flatten(2).transpose(1, 2))  # (b, tokens, width)
        hidden = hidden + self.text(text) + self.time(times[..., None]).repeat_interleave(each, dim=1)
        for layer in self.layers:
            hidden = hidden + layer(hidden, angles, chunk[:, None] >= chunk)
        return self.out(hidden.tanh()).transpose(1, 2).unflatten(2, (frames, *grid))


@dataclass
class ToyOutput(BaseOutput):
    frames: torch.Tensor


class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)

    def encode_prompt(self, prompt):
        texts = [prompt] if isinstance(prompt, str) else prompt
        return torch.tensor([[[len(text) % (n + 2) for n in range(TEXT)]] for text in texts]) / TEXT

    def draw(self, rows, frames, generator):
        return torch.randn(
            rows, self.transformer.config.channels, frames, *self.transformer.config.grid, generator=generator
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt=None,
        num_frames=8,
        num_inference_steps=2,
        generator=None,
        latents=None,
        prompt_embeds=None,
        output_type="latent",
        return_dict=True,
    ):
        text = self.encode_prompt(prompt) if prompt_embeds is None else prompt_embeds
        sizes, done = [min(self.transformer.config.chunk_frames, num_frames)] * num_frames, []
        sizes = sizes[: -(-num_frames // sizes[0])]
        with self.progress_bar(total=len(sizes) * num_inference_steps) as bar:
            for frames in sizes:
                made = self.draw(len(text), frames, generator) if latents is None else latents
                for now, then in pairwise(torch.linspace(1, 0, num_inference_steps + 1)):
                    video = torch.cat([*done, made], dim=2)
                    times = torch.zeros(len(text), video.shape[2])
                    times[:, -frames:] = now
                    made = made + (then - now) * self.transformer(video, times, text)[:, :, -frames:]
                    bar.update()
                done.append(made)
        video = torch.cat(done, dim=2)[:, :, :num_frames]
        return ToyOutput(frames=video) if return_dict else (video,)


# The family: begin
class ToyProcessor(PackedAttnProcessor):
    """Self-attention of one layer over kvpack's memory: what is projected, and what becomes of the result."""

    def project(self, attn, hidden):
        queries, keys, values = (each.unflatten(2, (attn.heads, -1)) for each in attn.qkv(hidden).chunk(3, dim=-1))
        return paired(attn.norm(queries)), paired(attn.norm(keys)), values

    def output(self, attn, hidden, attended):
        return attn.out(attended.flatten(2))


class ToyDenoiser(Denoiser):
    """The transformer over kvpack's memory: where it attends, and the forward of a clean chunk."""

    def seam(self):
        return attached(self.transformer, self.transformer.layers, lambda *_: self.layers_for("cond"), ToyProcessor)

    def forward_clean(self, branch, latents):
        self.transformer(latents, latents.new_zeros(latents.shape[0], latents.shape[2]), self.conditioning[branch])


class ToyRun(Run):
    """One call of the pipeline: what is asked for, and the stock call that makes one chunk of it."""

    output_class = ToyOutput

    def checked(self, arguments):
        require_int("num_inference_steps", arguments["num_inference_steps"], minimum=1)
        if arguments["output_type"] != "latent":
            raise InvalidOptionError(f"output_type must be latent, got {arguments['output_type']!r}")
        return arguments

    def fit(self, stack):
        return with_chunk_frames(stack, self.pipeline.transformer.config.chunk_frames, "chunk_frames")

    def latent_frames(self):
        return self.call["num_frames"]

    def frame_size(self):
        return tuple(self.pipeline.transformer.config.grid)

    def encode(self, prompt):
        return {"cond": prompt if isinstance(prompt, torch.Tensor) else self.pipeline.encode_prompt(prompt)}

    def new_denoiser(self, geometry, conditioning):
        return ToyDenoiser(self.pipeline, self.stack, geometry, conditioning)

    def noise(self, first, frames):
        return self.pipeline.draw(self.rows, frames, self.call["generator"])

    def stock_call(self, noise):
        own = {"prompt": None, "prompt_embeds": self.denoiser.conditioning["cond"], "return_dict": False}
        return {**self.call, **own, "latents": noise, "num_frames": noise.shape[2]}


class ToyAdapter(Adapter):
    """What the model is, and what cannot work with it."""

    name = "toy"
    pipelines = (ToyPipeline,)
    run_class = ToyRun

    def check(self, pipeline):
        transformer = pipeline.transformer
        check_placement(transformer, transformer.layers, pipeline._execution_device, transformer.config.head_dim)

    def geometry(self, configs, height, width, dtype):
        config = configs["transformer"]
        sizes = config["num_layers"], config["heads"], config["head_dim"]
        return Geometry(*sizes, (height, width), SPLIT, dtype=dtype)

    def forward_flops(self, configs, query_tokens, attended_tokens):
        config = configs["transformer"]
        width = config["heads"] * config["head_dim"]
        return 4 * config["num_layers"] * query_tokens * width * (2 * width + attended_tokens)

    def temporal_scale(self, configs):
        return 1


# The family: end


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    pipe = ToyPipeline(ToyTransformer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(chunks, **changed):
    seed = torch.Generator().manual_seed(0)
    return {"prompt": "a red circle", "num_frames": 2 * chunks, "generator": seed, **changed}


def test_the_family_is_short():
    family = Path(__file__).read_text().split("# The family: begin")[1].split("# The family: end")[0]
    assert len(family.splitlines()) <= 100


def test_it_does_what_every_family_must(pipe):
    """Stock latents with a memory that forgets nothing, bounded growth, and the stock pipeline again afterwards."""
    full = registry().stack("full", {})
    identity = full, pipe(**call(3)).frames
    check_adapter(pipe, call, adapter=ToyAdapter(), identity=identity, chunks=32)
    assert type(pipe) is ToyPipeline


def test_nothing_is_registered(pipe):
    kvpack.enable(pipe, "packforcing", topk=1, adapter=ToyAdapter())
    assert "toy" not in registry().names("adapter")
    kvpack.enable(pipe, "self-forcing")  # the adapter stays
    assert pipe(**call(4)).frames.shape[2] == 8
    kvpack.disable(pipe)
    with pytest.raises(UnsupportedPipelineError, match="no adapter for ToyTransformer in ToyPipeline"):
        kvpack.enable(pipe)


@pytest.mark.parametrize(
    ("stack", "options"), [("krea", {"chunk_frames": 2, "context_frames": 4}), ("packforcing", {"compressor": "lr"})]
)
def test_a_memory_that_needs_pixels_is_refused_by_a_family_that_decodes_no_chunk(pipe, stack, options):
    kvpack.enable(pipe, stack, adapter=ToyAdapter(), **options)
    with pytest.raises(UnsupportedPipelineError, match=f"the memory {stack} needs each chunk decoded"):
        pipe(**call(4))


def test_prompts_change_and_a_memory_forgets(pipe):
    kvpack.enable(pipe, "self-forcing", chunk_frames=2, window_frames=4, sink_frames=2, adapter=ToyAdapter())
    pipe.packforcing.fps = 1
    plain = pipe(**call(6)).frames
    other = pipe(**call(6, prompt=[(0, "a red circle"), (8, "then the grass moves on")])).frames
    assert torch.equal(plain[:, :, :8], other[:, :, :8])
    assert not torch.allclose(plain[:, :, 8:], other[:, :, 8:], atol=1e-3)
    kvpack.disable(pipe)
    assert not torch.allclose(pipe(**call(6)).frames[:, :, 10:], plain[:, :, 10:], atol=1e-3)


def test_a_skipped_layer_is_told(pipe):
    kvpack.enable(pipe, "full", adapter=ToyAdapter())
    pipe.transformer.layers[1].forward = lambda hidden, *_: hidden
    with pytest.raises(UnsupportedPipelineError, match=r"left the self-attention of layers \[1\] out"):
        pipe(**call(2))
