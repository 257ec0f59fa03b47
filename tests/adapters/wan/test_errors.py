"""What cannot work is refused by name, and whatever happens the pipeline's modules are stock again and it runs."""

import copy
import re
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FirstBlockCacheConfig, UNet2DModel, WanPipeline
from diffusers.models.attention_dispatch import AttentionBackendName

import kvpack
from helpers import generated, pool_stack, quiet
from kvpack.errors import (
    GradientError,
    InvalidOptionError,
    KVPackError,
    NonFiniteLatentsError,
    PolicyError,
    UnknownNameError,
    UnsupportedPipelineError,
)
from kvpack.memory.blocks import KVBlock
from kvpack.memory.roles import Placement, Segment
from kvpack.planning import presets
from kvpack.policies import (
    ContiguousReindexer,
    LowResolutionCompressor,
    PoolCompressor,
    QueryTopK,
    SinkMidRecentPartitioner,
)
from kvpack.testing import tiny_wan_pipeline, tiny_wan_transformer

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_frames": 45,  # 12 latent frames: six chunks
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
BRIEF = {"num_frames": 21, "num_inference_steps": 1}  # three chunks
SIZES = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 1}


generate = partial(generated, **CALL)


@pytest.fixture(scope="module")
def shared():
    pipe = quiet(tiny_wan_pipeline())
    stock = generate(pipe, **BRIEF)
    pipe.enable_packforcing("packforcing", **SIZES, compressor="pool")
    packed = generate(pipe, **BRIEF)
    pipe.disable_packforcing()
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    return pipe, stock, packed, processors


@pytest.fixture
def untouched(shared):
    """An enabled pipeline for what is refused before anything is computed; its modules must be stock afterwards."""
    pipe, *_, processors = shared
    pipe.enable_packforcing("packforcing", **SIZES, compressor="pool")
    yield pipe
    assert [block.attn1.processor for block in pipe.transformer.blocks] == processors
    assert "forward" not in vars(pipe.transformer)
    for module in pipe.transformer.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert not pipe.transformer._diffusers_hook.hooks
    assert torch.is_grad_enabled()
    if isinstance(pipe, kvpack.pipeline.enabled.PackForcingMixin):
        assert pipe.packforcing.sessions == {}
        assert pipe._kvpack.driving is None
    pipe.disable_packforcing()


@pytest.fixture
def pipe(untouched, shared):
    """An enabled pipeline that must be as good as new afterwards, whatever the test did."""
    yield untouched
    pipe, stock, packed, _ = shared
    pipe.enable_packforcing("packforcing", **SIZES, compressor="pool")
    assert torch.equal(generate(pipe, **BRIEF), packed)
    pipe.disable_packforcing()
    assert torch.equal(generate(pipe, **BRIEF), stock)


# What cannot be driven


def test_no_adapter():
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(4,), norm_num_groups=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    )  # fmt: skip
    other = DDPMPipeline(unet, DDPMScheduler())
    with pytest.raises(
        UnsupportedPipelineError,
        match=r"no adapter for UNet2DModel in DDPMPipeline. Installed: .*wan.* See docs/extend/adapter.md",
    ):
        other.enable_packforcing()
    assert type(other) is DDPMPipeline
    other.disable_packforcing()
    with pytest.raises(UnsupportedPipelineError, match="no adapter for int"):
        kvpack.enable(5)


def variant(pipe, **components):
    return WanPipeline(**{**pipe.components, **components})


def test_two_transformers(pipe):
    second = tiny_wan_transformer(1)
    with pytest.raises(UnsupportedPipelineError, match="transformer_2 as well"):
        variant(pipe, transformer_2=second).enable_packforcing("full")
    with pytest.raises(UnsupportedPipelineError, match="no transformer"):
        variant(pipe, transformer=None, transformer_2=second).enable_packforcing("full")
    pipe.register_modules(transformer_2=second)
    with pytest.raises(UnsupportedPipelineError, match="transformer_2 as well"):
        generate(pipe)
    pipe.register_modules(transformer_2=None)


@pytest.mark.parametrize("there", [("transformer",), ("transformer_2",), ()])
def test_experts_that_share_the_steps(there, pipe, tmp_path):
    """What `from_pretrained(..., transformer_2=None)` gives would fail in the middle of denoising."""
    parts = {name: tiny_wan_transformer(1) if name in there else None for name in ("transformer", "transformer_2")}
    experts = WanPipeline(**{**pipe.components, **parts}, boundary_ratio=0.875)
    with pytest.raises(UnsupportedPipelineError, match=r"boundary_ratio=0.875") as refused:
        experts.enable_packforcing("full")
    assert f"{' and '.join(there) or 'neither'} of the two" in str(refused.value)
    assert "load it with transformer only" not in str(refused.value)
    assert type(experts) is WanPipeline
    experts.save_config(tmp_path)
    with pytest.raises(UnsupportedPipelineError, match=r"has boundary_ratio=0.875"):
        presets.from_folder(tmp_path)


class Parallel:
    """Stands in for a context-parallel config."""


@pytest.fixture(params=["cache", "checkpointing", "parallel model", "parallel processor", "xformers"])
def switch(request):
    """Switches something on that cannot work, and off again."""

    def flip(transformer, on):
        if request.param == "cache":
            transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1)) if on else transformer.disable_cache()
        elif request.param == "checkpointing":
            (transformer.enable_gradient_checkpointing if on else transformer.disable_gradient_checkpointing)()
        elif request.param == "parallel model":
            transformer._parallel_config = Parallel() if on else None
        elif request.param == "xformers":
            transformer.blocks[1].attn1.processor._attention_backend = AttentionBackendName.XFORMERS if on else None
        else:
            transformer.blocks[1].attn1.processor._parallel_config = Parallel() if on else None

    flip.match = {
        "cache": "disable_cache",
        "checkpointing": "disable_gradient_checkpointing",
        "xformers": "xformers",
    }.get(request.param, "context parallelism")
    return flip


def test_switched_on_before(switch, pipe):
    pipe.disable_packforcing()
    switch(pipe.transformer, True)
    with pytest.raises(UnsupportedPipelineError, match=switch.match):
        pipe.enable_packforcing("full")
    assert type(pipe) is WanPipeline
    switch(pipe.transformer, False)


def test_switched_on_after(switch, pipe):
    switch(pipe.transformer, True)
    with pytest.raises(UnsupportedPipelineError, match=switch.match):
        generate(pipe)
    switch(pipe.transformer, False)


def test_switched_on_between_two_chunks(switch, pipe):
    stream = pipe.packforcing.stream(**CALL)
    next(stream)
    switch(pipe.transformer, True)
    with pytest.raises(UnsupportedPipelineError, match=switch.match):
        next(stream)
    switch(pipe.transformer, False)


def test_gradients_in_a_callback(pipe):
    def callback(pipe, step, timestep, tensors):
        torch.set_grad_enabled(True)
        return tensors

    with pytest.raises(GradientError, match=r"torch.set_grad_enabled\(True\)"):
        generate(pipe, callback_on_step_end=callback)


def test_tiled_decode(pipe):
    pipe.vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
    with pytest.raises(UnsupportedPipelineError, match="disable_tiling"):
        generate(pipe, output_type="np")
    generate(pipe)  # latents need no decoder
    pipe.vae.disable_tiling()


# What is asked for


@pytest.mark.parametrize(
    ("stack", "options", "error", "message"),
    [
        ("packfrocing", {}, UnknownNameError, "no stack named 'packfrocing'; did you mean 'packforcing'"),
        ("packforcing", {"selector": "top_k"}, UnknownNameError, "no selector named 'top_k'; did you mean 'topk'"),
        ("packforcing", {"compressor": "pol"}, UnknownNameError, "did you mean 'pool'"),
        ("packforcing", {"reindexer": "contiguos"}, UnknownNameError, "did you mean 'contiguous'"),
        ("packforcing", {"top_k": 3}, InvalidOptionError, "'top_k'; did you mean 'topk'"),
        ("full", {"window_frames": 3}, InvalidOptionError, "no option of stack full named 'window_frames'"),
        ("packforcing", {"topk": -1}, InvalidOptionError, "topk must be >= 0, got -1"),
        ("packforcing", {"sink_frames": -1}, InvalidOptionError, "sink_frames must be >= 0, got -1"),
        ("packforcing", {"chunk_frames": 0}, InvalidOptionError, "chunk_frames must be >= 1, got 0"),
        ("packforcing", {"archive_blocks": -2}, InvalidOptionError, "archive_blocks must be >= 0, got -2"),
        ("packforcing", {"sink_frames": 1, "recent_frames": 2}, InvalidOptionError, "chunk_frames 4, got 1 + 2"),
        ("self-forcing", {"window_frames": 5}, InvalidOptionError, "window_frames must be at least 6"),
        ("self-forcing", {"window_frames": 6, "sink_frames": 4}, InvalidOptionError, "at least 7"),
        ({"name": "x"}, {}, InvalidOptionError, "a stack needs name, partitioner"),
        ({"name": "x"}, {"topk": 3}, InvalidOptionError, "belong to a named stack"),
    ],
)  # fmt: skip
def test_wrong_stacks(stack, options, error, message, untouched):
    pipe = untouched
    before = pipe.packforcing.stack
    with pytest.raises(error, match=re.escape(message)):
        pipe.enable_packforcing(stack, **options)
    assert pipe.packforcing.stack is before
    pipe.disable_packforcing()
    with pytest.raises(error):
        pipe.enable_packforcing(stack, **options)
    assert type(pipe) is WanPipeline


def latents(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"prompt": []}, InvalidOptionError, "prompt is an empty list"),
        ({"prompt": None}, ValueError, "Provide either `prompt` or `prompt_embeds`"),
        ({"prompt": 3}, ValueError, "`prompt` has to be of type"),
        ({"negative_prompt": ["a", "b"], "guidance_scale": 3.0, "prompt": ["a"]}, ValueError, "batch size"),
        ({"output_type": "mp4"}, InvalidOptionError, "output_type must be one of latent, np, pt, pil, got 'mp4'"),
        ({"height": 20}, ValueError, "divisible by 16"),
        ({"height": 0}, InvalidOptionError, "height and width must be multiples of 16 and 16"),
        ({"width": -32}, InvalidOptionError, "height and width must be"),
        ({"num_frames": 0}, InvalidOptionError, "num_frames must be >= 1, got 0"),
        ({"num_frames": -8}, InvalidOptionError, "num_frames must be >= 1, got -8"),
        ({"num_frames": None}, InvalidOptionError, "num_frames None is endless"),
        ({"attention_kwargs": 1}, InvalidOptionError, "attention_kwargs must be a dict or None, got int"),
        ({"num_frames": "81"}, InvalidOptionError, "num_frames must be a whole number"),
        ({"num_inference_steps": 0}, InvalidOptionError, "num_inference_steps must be >= 1"),
        ({"num_videos_per_prompt": -1}, InvalidOptionError, "num_videos_per_prompt must be >= 1"),
        ({"guidance_scale_2": 3.0}, ValueError, "boundary_ratio"),
        ({"callback_on_step_end_tensor_inputs": ["nonsense"]}, ValueError, "nonsense"),
        ({"generator": [torch.Generator()] * 3}, ValueError, "list of generators of length 3"),
        ({"latents": latents(16, 3, 2, 4)}, InvalidOptionError, "latents must be.*got [16, 3, 2, 4]"),
        ({"latents": latents(1, 8, 3, 2, 4)}, InvalidOptionError, "16 channels.*got [1, 8, 3, 2, 4]"),
        ({"latents": latents(1, 16, 0, 2, 4)}, InvalidOptionError, "got [1, 16, 0, 2, 4]"),
        ({"latents": latents(1, 16, 3, 3, 4)}, InvalidOptionError, "multiples of 2 and 2"),
        ({"latents": "noise"}, InvalidOptionError, "got str"),
        ({"latents": latents(3, 16, 3, 2, 4), "prompt": ["a", "a"]}, InvalidOptionError, "embeddings 2, latents 3"),
        ({"latents": latents(1, 16, 3, 2, 4).numpy()}, InvalidOptionError, "got ndarray"),
        ({"guidance_scale": "3"}, InvalidOptionError, "guidance_scale must be a finite number, e.g. 5.0, got '3'"),
        ({"guidance_scale": float("nan")}, InvalidOptionError, "guidance_scale must be a finite number"),
        (
            {"prompt": None, "prompt_embeds": latents(1, 8, 5)},
            InvalidOptionError,
            "embeddings of the prompt must be [batch, tokens, 32], got [1, 8, 5]",
        ),
        (
            {"prompt": None, "prompt_embeds": latents(1, 8, 32) / 0},
            NonFiniteLatentsError,
            "embeddings of the prompt hold NaN or infinity",
        ),
        ({"latents": latents(1, 16, 3, 2, 4) / 0}, NonFiniteLatentsError, "latents hold NaN or infinity"),
        ({"latents": latents(1, 16, 3, 2, 4) + float("inf")}, NonFiniteLatentsError, "latents hold NaN or infinity"),
    ],
)  # fmt: skip
def test_wrong_arguments(changed, error, message, untouched):
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(error, match=pattern):
        generate(untouched, **changed)


# What goes wrong on the way


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_turn_bad(chunk, value, pipe):
    def callback(pipe, step, timestep, tensors):
        frames = pipe.packforcing.sessions["cond"].frames
        return {"latents": tensors["latents"] * value} if frames == 2 * chunk and step == 1 else tensors

    with pytest.raises(NonFiniteLatentsError, match=f"chunk {chunk} holds NaN or infinity after denoising"):
        generate(pipe, callback_on_step_end=callback)
    assert pipe.packforcing.stats()["frames"] == 2 * chunk  # nothing of it was committed


@pytest.mark.parametrize(("error", "at"), [(ZeroDivisionError, 1), (KeyboardInterrupt, 2), (SystemExit, 6)])
def test_exceptions_in_a_callback(error, at, pipe):
    calls = 0

    def callback(pipe, step, timestep, tensors):
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return tensors

    with pytest.raises(error):
        generate(pipe, callback_on_step_end=callback, guidance_scale=3.0)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2, 3, 7, 8)), 11])
def test_exceptions_inside_the_model(error, call, pipe, monkeypatch):
    """In denoising or in a commit, of either branch."""
    block = pipe.transformer.blocks[1]
    forward, calls = block.forward, 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise error("out of memory")
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", failing)
        with pytest.raises(error):
            generate(pipe, guidance_scale=3.0)
    assert pipe.packforcing.stats()["frames"] == 2 * (call // 6)


def test_exceptions_in_the_compressor_and_the_decoder(pipe, monkeypatch):
    pipe.enable_packforcing("packforcing", **SIZES, compressor="lr")

    def failing(*args, **kwargs):
        raise RuntimeError("no pixels")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae.decoder, "forward", failing)
        with pytest.raises(RuntimeError, match="no pixels"):
            generate(pipe)
    tokens = LowResolutionCompressor.tokens
    with monkeypatch.context() as patch:
        patch.setattr(LowResolutionCompressor, "tokens", lambda self, chunk: tokens(self, chunk)[:, 1:])
        with pytest.raises(PolicyError, match=r"LowResolutionCompressor.tokens returned .*, but span\(\) announces"):
            generate(pipe)
    pipe.enable_packforcing("packforcing", **SIZES, compressor="pool")


# Policies that break their contract


@dataclass(frozen=True)
class Selects(QueryTopK):
    what: str = "fine"

    def select(self, query, candidates):
        rows = query.queries.shape[0]
        return {
            "fine": torch.zeros(rows, 2, dtype=torch.long) + torch.arange(2),
            "index": torch.tensor([[0, 9]] * rows),
            "negative": torch.tensor([[0, -1]] * rows),
            "twice": torch.tensor([[1, 1]] * rows),
            "shape": torch.zeros(rows, 3, dtype=torch.long),
            "dtype": torch.zeros(rows, 2),
            "kind": [[0, 1]],
        }[self.what]


@dataclass(frozen=True)
class Limits(QueryTopK):
    what: object = 99

    def limit(self, candidates):
        return self.what


@dataclass(frozen=True)
class Compresses(PoolCompressor):
    what: str = "fine"

    def compress(self, block, grid):
        good = super().compress(block, grid)
        return {
            "fine": good,
            "shape": KVBlock(good.keys.repeat(1, 2, 1, 1), good.values.repeat(1, 2, 1, 1), good.span),
            "dtype": KVBlock(good.keys, good.values.double(), good.span),
            "kind": (good.keys, good.values),
        }[self.what]


@dataclass(frozen=True)
class Places(ContiguousReindexer):
    what: str = "fine"

    def place(self, layout):
        good = super().place(layout)
        if layout.frames.shape[1] <= 2:
            return good
        return {
            "fine": good,
            "nan": Placement(good.starts * float("nan"), good.lengths, good.chunk_start),
            "chunk": Placement(good.starts, good.lengths, good.chunk_start + float("inf")),
            "shape": Placement(good.starts[:, 1:], good.lengths, good.chunk_start),
            "dtype": Placement(good.starts.long(), good.lengths, good.chunk_start),
            "kind": good.starts,
        }[self.what]


@dataclass(frozen=True)
class Partitions(SinkMidRecentPartitioner):
    what: str = "fine"

    def partition(self, history_frames, chunk_frames):
        good = super().partition(history_frames, chunk_frames)
        if history_frames <= (6 if self.what == "revived" else 4) or self.what == "fine":
            return good
        return {
            "beyond": (Segment("recent", range(history_frames + 1)),),
            "overlap": (*good, Segment("recent", range(1, 3))),
            "revived": (Segment("recent", range(history_frames)),),
        }[self.what]


stack = partial(pool_stack, partitioner=SinkMidRecentPartitioner(2, 2), name="broken", chunk_frames=2)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"selector": Selects(2, "index")}, "Selects.select returned index 9, but layer 0 has 3 candidates"),
        ({"selector": Selects(2, "negative")}, "Selects.select returned index -1, but layer 0 has 3 candidates"),
        ({"selector": Selects(2, "twice")}, "Selects.select returned an index twice in layer 0"),
        ({"selector": Selects(2, "shape")}, "Selects.select returned shape (1, 3) in layer 0, but it must be (1, 2)"),
        ({"selector": Selects(2, "dtype")}, "Selects.select returned torch.float32 in layer 0, but indices are int64"),
        ({"selector": Selects(2, "kind")}, "Selects.select returned list in layer 0"),
        ({"selector": Limits(2, 99)}, "Limits.limit returned 99, but it must be an int from 0 to 0"),
        ({"selector": Limits(2, -1)}, "Limits.limit returned -1"),
        ({"selector": Limits(2, 0.5)}, "Limits.limit returned 0.5"),
        ({"compressor": Compresses("shape")}, "keys (1, 2, 2, 12) in layer 0, but span() announces (1, 1, 2, 12)"),
        ({"compressor": Compresses("dtype")}, "Compresses.compress returned values torch.float64 in layer 0"),
        ({"compressor": Compresses("kind")}, "Compresses.compress returned tuple in layer 0, but it must be a KVBlock"),
        ({"reindexer": Places("nan")}, "Places.place returned positions for layer 0 that are not finite"),
        ({"reindexer": Places("chunk")}, "Places.place returned positions for layer 0 that are not finite"),
        ({"reindexer": Places("shape")}, "starts torch.float64 (1, 2), but it must be floating point (1, 3)"),
        ({"reindexer": Places("dtype")}, "Places.place returned starts torch.int64 (1, 3)"),
        ({"reindexer": Places("kind")}, "Places.place returned Tensor, but it must be a Placement"),
        ({"partitioner": Partitions(2, 2, "beyond")}, "Partitions.partition returned recent range(0, 7) of 6 frames"),
        ({"partitioner": Partitions(2, 2, "overlap")}, "segments ascend and stay in the history"),
        ({"partitioner": Partitions(2, 2, "revived")}, "wants 8 whole frames; 6 of them are still whole"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)  # fmt: skip
def test_broken_policies(roles, message, pipe):
    pipe.enable_packforcing(stack(**roles))
    with pytest.raises(PolicyError, match=re.escape(message)):
        generate(pipe, num_inference_steps=1)


def test_policies_that_keep_their_contract(pipe):
    """The broken ones above, unbroken: it is what they return that is refused."""
    roles = {
        "selector": Selects(2),
        "compressor": Compresses(),
        "reindexer": Places(),
        "partitioner": Partitions(2, 2),
    }
    pipe.enable_packforcing(stack(**roles))
    assert torch.isfinite(generate(pipe)).all()


def test_a_policy_that_fails_leaves_history_as_it_was(pipe):
    pipe.enable_packforcing(stack(selector=Selects(2, "index")))
    with pytest.raises(PolicyError):
        generate(pipe, num_inference_steps=1)
    assert pipe.packforcing.stats()["frames"] == 10  # the chunk that chose wrongly is not in it


def test_every_error_is_a_kvpack_error():
    for error in (GradientError, InvalidOptionError, NonFiniteLatentsError, PolicyError, UnsupportedPipelineError):
        assert issubclass(error, KVPackError)
    assert copy.copy(KVPackError("x")).args == ("x",)
