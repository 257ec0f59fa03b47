"""The call of an enabled `WanPipeline`: batches, seeds, embeddings, callbacks, interrupts, outputs."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL.Image import Image

from helpers import generated, quiet, seeded
from kvpack.errors import BusyPipelineError, UnsupportedPipelineError
from kvpack.testing import tiny_wan_pipeline

PROMPTS = ["a red circle moving over grass", "the blue square at night", "green triangle"]
CALL = {
    "prompt": PROMPTS[0],
    "height": 32,
    "width": 48,
    "num_frames": 29,  # 8 latent frames: three chunks, the last not full
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
STEPS = 3 * CALL["num_inference_steps"]


REST = {name: value for name, value in CALL.items() if name != "prompt"}
generate = partial(generated, **CALL)


@pytest.fixture
def pipe():
    """Enabled with a window, so that blocks are dropped."""
    pipe = quiet(tiny_wan_pipeline())
    return pipe.enable_packforcing("self-forcing", chunk_frames=3, window_frames=6, sink_frames=1)


@pytest.mark.parametrize(
    ("stack", "guidance_scale", "options"),
    [
        ("full", 4.0, {}),
        ("packforcing", 4.0, {"reindexer": "contiguous"}),
        pytest.param("self-forcing", 1.0, {}, marks=pytest.mark.slow),
        pytest.param("packforcing", 1.0, {"reindexer": "fit"}, marks=pytest.mark.slow),
    ],
)
def test_rows_are_independent(stack, guidance_scale, options, pipe):
    if stack == "packforcing":
        options = {"topk": 2, "sink_frames": 3, "recent_frames": 3, **options}
    pipe.enable_packforcing(stack, chunk_frames=3, **options)
    changed = {"num_frames": 69, "num_inference_steps": 1, "guidance_scale": guidance_scale}
    together = generate(pipe, prompt=PROMPTS, generator=[seeded(row) for row in range(3)], **changed)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(pipe, seed=row, prompt=prompt, **changed)
        assert float((together[row] - alone[0]).abs().max() / alone.abs().max()) <= 1e-5


def test_videos_per_prompt(pipe):
    four = generate(pipe, prompt=PROMPTS[:2], num_videos_per_prompt=2, generator=[seeded(s) for s in range(4)])
    assert four.shape[0] == 4
    for row in range(4):
        alone = generate(pipe, seed=row, prompt=PROMPTS[row // 2])
        assert float((four[row] - alone[0]).abs().max()) <= 1e-5


def test_same_seed_same_bits(pipe):
    first = generate(pipe, output_type="pt")
    assert torch.equal(generate(pipe, output_type="pt"), first)
    assert not torch.equal(generate(pipe, seed=1, output_type="pt"), first)


def test_a_subclass_is_called_once_a_chunk(pipe):
    class Toned(WanPipeline):
        def __call__(
            self,
            prompt=None,
            height=32,
            width=48,
            num_frames=9,
            num_inference_steps=2,
            guidance_scale=1.0,
            guidance_scale_2=None,
            attention_kwargs=None,
            tone="calm",
            generator=None,
            max_sequence_length=8,
            num_videos_per_prompt=1,
            latents=None,
            prompt_embeds=None,
            negative_prompt=None,
            negative_prompt_embeds=None,
            output_type="latent",
            return_dict=True,
            callback_on_step_end=None,
            callback_on_step_end_tensor_inputs=("latents",),
        ):
            said.append(tone)
            given = {
                name: value for name, value in locals().items() if name not in ("self", "tone", "said", "__class__")
            }
            return super().__call__(**given)

    said = []
    own = quiet(Toned(**pipe.components)).enable_packforcing(pipe.packforcing.stack)
    wanted = generate(pipe)
    assert torch.equal(own(CALL["prompt"], num_frames=29, generator=seeded()).frames, wanted)  # its own defaults hold
    assert said == ["calm"] * 3
    parts = list(own.packforcing.stream(CALL["prompt"], 32, 48, 29, tone="loud", generator=seeded()))
    assert torch.equal(torch.cat(parts, dim=2), wanted)
    assert said[3:] == ["loud"] * 3


def test_a_subclass_whose_arguments_have_no_names_is_refused(pipe):
    """What it sets itself, as by `kwargs.setdefault`, would be another video than the memory is made for."""

    class Passing(WanPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    class Short(WanPipeline):
        def __call__(self, prompt=None, num_frames=9):
            return super().__call__(prompt, num_frames=num_frames)

    short = quiet(Short(**pipe.components)).enable_packforcing("full", chunk_frames=3)
    with pytest.raises(UnsupportedPipelineError, match=r"Short.__call__ lacks negative_prompt, .* of Wan"):
        short("a red circle")
    own = quiet(Passing(**pipe.components)).enable_packforcing("full", chunk_frames=3)
    message = r"Passing.__call__ takes \*args and \*\*kwargs, .* name its arguments"
    with pytest.raises(UnsupportedPipelineError, match=message):
        generate(own)
    with pytest.raises(UnsupportedPipelineError, match=message):
        own.packforcing.stream(**CALL)


def test_without_a_generator_the_global_one_is_used_as_stock(pipe):
    torch.manual_seed(4)
    first = generate(pipe, generator=None, num_frames=9)
    pipe.disable_packforcing()
    torch.manual_seed(4)
    stock = generate(pipe, generator=None, num_frames=9)
    assert float((first - stock).norm() / stock.norm()) <= 1e-6


def test_a_beginning_does_not_depend_on_the_length(pipe):
    long = generate(pipe)
    assert long.shape[2] == 8
    for frames, latents in ((1, 1), (9, 3), (13, 4), (17, 5), (25, 7), (30, 8)):
        short = generate(pipe, num_frames=frames)
        assert torch.equal(short, long[:, :, :latents])
    pixels, fewer = generate(pipe, output_type="pt"), generate(pipe, output_type="pt", num_frames=17)
    assert pixels.shape[1] == 29
    assert torch.equal(fewer, pixels[:, :17])


def test_given_latents(pipe):
    noise = torch.randn(1, 16, 9, 4, 6, generator=seeded(3))
    whole = generate(pipe, latents=noise)
    assert whole.shape == noise.shape  # the latents, not num_frames, say how many
    assert torch.equal(generate(pipe, latents=noise[:, :, :6]), whole[:, :, :6])
    partly = generate(pipe, latents=noise[:, :, :7])  # the last chunk is filled up with drawn noise, and trimmed
    assert partly.shape[2] == 7
    assert torch.equal(partly[:, :, :6], whole[:, :, :6])
    assert torch.equal(generate(pipe, latents=noise[:, :, :7]), partly)
    once, again = (
        generate(pipe, latents=noise[:, :, :7], generator=None) for _ in range(2)
    )  # as of the stock pipeline
    assert torch.equal(once, again)


def test_given_latents_set_the_size_as_stock(pipe):
    noise = torch.randn(1, 16, 3, 2, 4, generator=seeded(3))
    given = generate(pipe, latents=noise)
    pipe.disable_packforcing()
    stock = generate(pipe, latents=noise)
    assert float((given - stock).norm() / stock.norm()) <= 1e-6


def test_one_prompt_for_a_batch_of_latents_as_stock(pipe):
    noise = torch.randn(3, 16, 6, 4, 6, generator=seeded(3))
    together = generate(pipe, latents=noise)
    for row in range(3):
        alone = generate(pipe, latents=noise[row : row + 1])
        assert float((together[row] - alone[0]).abs().max()) <= 1e-5


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_given_embeddings(guidance_scale, pipe):
    wanted = generate(pipe, prompt=PROMPTS, negative_prompt=["night"] * 3, guidance_scale=guidance_scale)
    with torch.no_grad():
        cond, uncond = pipe.encode_prompt(PROMPTS, ["night"] * 3, guidance_scale > 1, max_sequence_length=8)
    embeds = {"prompt": None, "prompt_embeds": cond, "negative_prompt_embeds": uncond}
    assert torch.equal(generate(pipe, guidance_scale=guidance_scale, **embeds), wanted)
    two = generate(pipe, prompt=None, prompt_embeds=cond[:1], num_videos_per_prompt=2, generator=[seeded(0), seeded(1)])
    assert two.shape[0] == 2


def test_guidance_has_a_session_for_each_branch(pipe):
    names = []

    def callback(pipe, step, timestep, tensors):
        names.append(tuple(pipe.packforcing.sessions))
        return tensors

    guided = generate(pipe, guidance_scale=5.0, callback_on_step_end=callback)
    assert set(names) == {("cond", "uncond")}
    assert pipe.packforcing.sessions == {}
    assert pipe.packforcing.stats()["branches"] == ["cond", "uncond"]
    other = generate(pipe, guidance_scale=5.0, negative_prompt="red circle")
    assert not torch.equal(guided, other)
    assert not torch.equal(guided, generate(pipe))
    assert pipe.packforcing.stats()["branches"] == ["cond"]


def test_callbacks_are_called_at_every_step(pipe):
    calls = []

    def callback(pipe, step, timestep, tensors):
        calls.append((step, float(timestep), sorted(tensors), tuple(tensors["latents"].shape)))
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    with_one = generate(
        pipe, guidance_scale=5.0, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names
    )
    assert torch.equal(with_one, generate(pipe, guidance_scale=5.0))
    assert len(calls) == STEPS
    assert [call[0] for call in calls] == [0, 1] * 3
    assert all(call[2] == sorted(names) and call[3] == (1, 16, 3, 4, 6) for call in calls)


def test_replaced_embeddings_stay_replaced(pipe):
    other, _ = pipe.encode_prompt(PROMPTS[1], None, False, max_sequence_length=8)
    count = 0

    def callback(pipe, step, timestep, tensors):
        nonlocal count
        count += 1
        return {"prompt_embeds": other} if count == 2 else {}

    changed = generate(pipe, callback_on_step_end=callback)
    original = generate(pipe)
    assert torch.equal(changed[:, :, :3], original[:, :, :3])
    assert not torch.equal(changed[:, :, 3:6], original[:, :, 3:6])
    seen = []
    generate(
        pipe,
        callback_on_step_end=lambda p, s, t, k: (
            seen.append(k["prompt_embeds"]) or ({"prompt_embeds": other} if s else {})
        ),
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert not torch.equal(seen[0], other)
    assert all(torch.equal(each, other) for each in seen[2:])


def test_another_pipeline_on_the_same_transformer_runs_between_chunks_and_not_inside_one(pipe):
    """Inside, its forwards would be taken for those of this video."""
    beside, made = WanPipeline(**pipe.components), []
    beside.set_progress_bar_config(disable=True)

    def preview(*_):
        made.append(beside(**{**CALL, "num_frames": 9}, generator=seeded()).frames)
        return {}

    plain, alone = generate(pipe), (preview(), made.pop())[1]
    with pytest.raises(BusyPipelineError, match="called inside a chunk; call it between two, as in on_chunk"):
        generate(pipe, callback_on_step_end=preview)
    assert torch.equal(generate(pipe, on_chunk=preview), plain)
    assert len(made) > 1
    assert all(torch.equal(each, alone) for each in made)


def test_replaced_latents_are_committed(pipe):
    def callback(pipe, step, timestep, tensors, scale):
        return {"latents": tensors["latents"] * scale if step == 1 else tensors["latents"]}

    plain = generate(pipe, callback_on_step_end=partial(callback, scale=1.0))
    assert torch.equal(plain, generate(pipe))
    halved = generate(pipe, callback_on_step_end=partial(callback, scale=0.5))
    assert torch.equal(halved[:, :, :3], plain[:, :, :3] * 0.5)
    assert not torch.equal(halved[:, :, 3:6], plain[:, :, 3:6] * 0.5)


class Count(PipelineCallback):
    tensor_inputs = ["latents", "prompt_embeds"]
    calls = 0

    def __init__(self):
        super().__init__(cutoff_step_ratio=1.0)

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert sorted(callback_kwargs) == sorted(self.tensor_inputs)
        self.calls += 1
        return callback_kwargs


@pytest.mark.parametrize("several", [False, True])
def test_callback_objects(several, pipe):
    one = Count()
    callback = MultiPipelineCallbacks([one, Count()]) if several else one
    assert torch.equal(generate(pipe, callback_on_step_end=callback), generate(pipe))
    assert one.calls == STEPS


@pytest.mark.parametrize("step", [1, 3, 4])
def test_interrupt_keeps_what_was_generated(step, pipe):
    calls = 0

    def callback(pipe, index, timestep, tensors):
        nonlocal calls
        calls += 1
        pipe._interrupt = calls == step
        return tensors

    whole = generate(pipe)
    part = generate(pipe, callback_on_step_end=callback)
    assert calls == step
    assert part.shape[2] == 3 * -(-step // 2)
    done = 3 * (step // 2)
    assert torch.equal(part[:, :, :done], whole[:, :, :done])
    calls = 0
    assert generate(pipe, callback_on_step_end=callback, output_type="pt").shape[1] == 4 * part.shape[2] - 3
    assert torch.equal(generate(pipe), whole)


def test_output_types_hold_the_same(pipe):
    latent = generate(pipe, prompt=PROMPTS[:2])
    pt = generate(pipe, prompt=PROMPTS[:2], output_type="pt")
    array = generate(pipe, prompt=PROMPTS[:2], output_type="np")
    images = generate(pipe, prompt=PROMPTS[:2], output_type="pil")
    assert latent.shape == (2, 16, 8, 4, 6)
    assert tuple(pt.shape) == (2, 29, 3, 32, 48)
    assert array.shape == (2, 29, 32, 48, 3)
    assert np.array_equal(array, pt.permute(0, 1, 3, 4, 2).numpy())
    assert [len(video) for video in images] == [29, 29]
    assert isinstance(images[0][0], Image)
    assert np.array_equal(np.asarray(images[1][28]), (array[1, 28] * 255).round().astype("uint8"))
    # and they are what the stock pipeline makes of these latents
    with torch.no_grad():
        vae = pipe.vae
        mean, std = (
            torch.tensor(each).view(1, 16, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std)
        )
        decoded = vae.decode(latent / (1.0 / std) + mean, return_dict=False)[0]
    assert torch.equal(pipe.video_processor.postprocess_video(decoded, output_type="pt"), pt)


def test_return_dict(pipe):
    frames = generate(pipe)
    output = pipe(generator=seeded(), return_dict=False, **CALL)
    assert isinstance(output, tuple)
    assert torch.equal(output[0], frames)
    named = pipe(generator=seeded(), **CALL)
    assert type(named).__name__ == "WanPipelineOutput"
    assert torch.equal(named[0], frames)


def test_positional_arguments(pipe):
    positional = pipe(CALL["prompt"], None, 32, 48, 29, 2, 1.0, generator=seeded(), max_sequence_length=8)
    assert positional.frames.shape == (1, 29, 32, 48, 3)
    with pytest.raises(TypeError, match="nonsense"):
        pipe(nonsense=1)


def test_signature_is_stock(pipe):
    assert inspect.signature(pipe.__call__) == inspect.signature(WanPipeline.__call__.__get__(pipe))
    assert inspect.signature(type(pipe).__call__) == inspect.signature(WanPipeline.__call__)
    assert pipe.__call__.__doc__ == WanPipeline.__call__.__doc__


@pytest.mark.parametrize("stack", ["full", "packforcing"])
def test_unipc(stack, pipe):
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    call = {"num_frames": 17, "num_inference_steps": 4, "guidance_scale": 3.0}
    options = {"topk": 1, "sink_frames": 1, "recent_frames": 1, "compressor": "pool"} if stack == "packforcing" else {}
    pipe.enable_packforcing(stack, chunk_frames=1, **options)
    frames = generate(pipe, **call)
    assert torch.isfinite(frames).all()
    assert torch.equal(generate(pipe, **call), frames)
    one = generate(pipe, **{**call, "num_frames": 1})
    pipe.disable_packforcing()
    stock = generate(pipe, **{**call, "num_frames": 1})
    assert float((one - stock).norm() / stock.norm()) <= 1e-6


class Bar:
    """Stands in for tqdm."""

    made = []

    def __init__(self, iterable=None, total=None, **config):
        self.total, self.updates, self.closed = total, 0, False
        Bar.made.append(self)

    def update(self, n=1):
        self.updates += n

    def close(self):
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def test_one_progress_bar(pipe, monkeypatch):
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    generate(pipe, guidance_scale=5.0, output_type="np")
    assert [(bar.total, bar.updates, bar.closed) for bar in Bar.made] == [(STEPS, STEPS, True)]
    with pytest.raises(ZeroDivisionError):
        generate(pipe, callback_on_step_end=lambda *_: 1 / 0)
    assert Bar.made[-1].closed
    stream = pipe.packforcing.stream(**{**CALL, "num_frames": None})
    next(stream)
    stream.close()
    assert Bar.made[-1].closed
    assert Bar.made[-1].updates == 2
    pipe.disable_packforcing()
    generate(pipe)
    assert (Bar.made[-1].total, Bar.made[-1].updates) == (2, 2)


def test_gradients_stay_switched_as_they_were(pipe):
    assert torch.is_grad_enabled()
    frames = generate(pipe)
    assert torch.is_grad_enabled()
    assert not frames.requires_grad
    with torch.inference_mode():
        assert torch.equal(generate(pipe), frames)
    with torch.no_grad():
        assert torch.equal(generate(pipe), frames)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("stack", ["packforcing", "h2o"])
def test_autocast_whose_norms_give_float32(stack):
    """As CUDA's does, while projections give bfloat16."""
    pipe, held = quiet(tiny_wan_pipeline()), []
    pipe.transformer.to(torch.bfloat16)
    pipe.enable_packforcing(stack)
    for wide in (False, True):
        for block in pipe.transformer.blocks if wide else ():
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.register_forward_hook(lambda module, given, output: output.float())
        with torch.autocast("cpu", torch.bfloat16):
            generated(pipe, **CALL)
        held.append(pipe.packforcing.stats()["resident_bytes"])
    assert held[0] == held[1]


def test_stats_of_the_last_generation(pipe):
    generate(pipe, guidance_scale=5.0, output_type="np")
    stats = pipe.packforcing.stats()
    assert stats["stack"] == "self-forcing"
    assert stats["chunks"] == 3
    assert stats["attended_tokens"] == 3 * 6  # one sink frame and two recent ones
    assert stats["attended_bytes"] == stats["attended_tokens"] * 2 * 2 * 24 * 4 * 2  # both branches
    assert all(stats["seconds"][phase] > 0 for phase in ("denoise", "commit", "decode"))


def test_size_is_adjusted_as_stock(pipe):
    """A patch of 4 needs multiples of 32; the check takes multiples of 16 and the pipeline rounds down."""
    large = tiny_wan_pipeline(patch_size=(1, 4, 4))
    large.set_progress_bar_config(disable=True)
    stock = generate(large, height=48, width=80, num_frames=5)
    large.enable_packforcing("full", chunk_frames=2)
    given = generate(large, height=48, width=80, num_frames=5)
    assert given.shape == stock.shape == (1, 16, 2, 4, 8)
    assert float((given - stock).norm() / stock.norm()) <= 1e-6
