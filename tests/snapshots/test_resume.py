"""A generation that was saved and resumed is the one that was not interrupted, bit for bit."""

from functools import partial
from itertools import islice

import pytest
import torch
from diffusers import (
    FlowMatchLCMScheduler,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
)
from peft import LoraConfig

import helpers
from helpers import SMALL, SMALL_CALL, quiet, row_seeds, same, seeded
from kvpack.errors import SnapshotError
from kvpack.plugins.registry import registry
from kvpack.scheduler import FlowMatchFewStepScheduler
from kvpack.shipped import demo_stack
from kvpack.testing import (
    tiny_anyflow_far_pipeline,
    tiny_sana_wm_refiner,
    tiny_skyreels_v2_pipeline,
    tiny_wan_pipeline,
)

CALL = SMALL_CALL
#: Where no frames are given: the decoder's own memory is that of the tests of batches, prompts and beginnings.
LATENTS = {**CALL, "output_type": "latent"}
picture, clip = partial(helpers.picture, 32), partial(helpers.clip, size=32)


def check_resumed(folder, make, call, at, before=None, options=None):
    """Compare a stream with one that is saved behind some chunks, and goes on with another pipeline.

    Args:
        folder: for the snapshots.
        make: makes an enabled pipeline.
        call: makes the arguments of a call.
        at: chunks behind which it is saved.
        before: called with a stream, in both, as soon as it is resumed.
        options: given to `resume`.
    """
    whole = make().packforcing.stream(**call())
    first = list(islice(whole, at))
    expected = [*([before(whole)] if before else ()), *whole]
    broken = make().packforcing.stream(**call())
    parts = []
    for chunk in islice(broken, at):
        parts.append(chunk)
        broken.save(folder)
    if not at:
        broken.save(folder)
    broken.close()
    torch.manual_seed(12345)
    resumed = make().packforcing.resume(folder, **(options or {}))
    rest = [*([before(resumed)] if before else ()), *resumed]
    assert same(parts, first)
    assert expected
    assert same(rest, expected)


def wan(name="packforcing", scheduler=None, **options):
    stack = demo_stack(name, **(options or SMALL)) if name == "packforcing" else demo_stack(name)
    return quiet(tiny_wan_pipeline(scheduler=scheduler)).enable_packforcing(stack)


@pytest.mark.parametrize("name", registry().names("stack"))
def test_every_stack(name, tmp_path):
    chunk = wan(name).packforcing.stack.chunk_frames
    frames = 4 * 10 * chunk - 3
    at = 7 if chunk > 1 else 9
    check_resumed(tmp_path, partial(wan, name), lambda: {**LATENTS, "num_frames": frames, "generator": seeded()}, at)


BATCH = {"prompt": ["a red circle", "the blue square"]}
CHANGES = [(0, ["a red circle", "the green square"]), (1.5, ["a blue circle", "night"]), (2.5, ["grass", "a"], "cut")]


@pytest.mark.parametrize("name", ["packforcing", "longlive", "krea", "infinity-rope", "token-trim", "memrope"])
def test_a_batch_whose_prompts_change(name, tmp_path):
    def call():
        return {**CALL, "prompt": CHANGES, "num_frames": 85, "generator": row_seeds()}

    check_resumed(tmp_path, partial(wan, name), call, 3)


@pytest.mark.parametrize("at", [1, 4])
def test_a_prompt_that_is_sent_at_once(at, tmp_path):
    """The last frames are replayed under the new prompt before anything is generated."""

    def call():
        return {**CALL, "num_frames": 61, "generator": seeded()}

    check_resumed(tmp_path, wan, call, at, before=lambda stream: stream.send("the green triangle", cut=True))


@pytest.mark.parametrize("compressor", ["lr", "hr", "pool"])
def test_compressors(compressor, tmp_path):
    options = {"compressor": compressor}
    if compressor == "hr":
        helpers.random_branch().save_pretrained(tmp_path / "branch")
        options["compressor"] = str(tmp_path / "branch")
    check_resumed(
        tmp_path / "snapshots",
        partial(wan, **SMALL, **options),
        lambda: {**LATENTS, "num_frames": 61, "generator": seeded()},
        5,
    )


def test_a_compressor_that_has_learned_more_is_another(tmp_path):
    helpers.random_branch().save_pretrained(tmp_path / "branch")
    stream = wan(**SMALL, compressor=str(tmp_path / "branch")).packforcing.stream(**LATENTS, num_frames=61)
    next(stream)
    stream.save(tmp_path / "snapshots")
    stream.close()
    branch = helpers.random_branch()
    branch.projection.weight.data += 0.5
    branch.save_pretrained(tmp_path / "branch")
    with pytest.raises(SnapshotError, match="the generation ran with another compressor than this WanPipeline has"):
        wan(**SMALL, compressor=str(tmp_path / "branch")).packforcing.resume(tmp_path / "snapshots")


@pytest.mark.parametrize("store", registry().names("codec"))
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_every_form_and_tier_of_an_archive(store, tier, tmp_path):
    def call():
        return {**LATENTS, "num_frames": 61, "generator": seeded()}

    check_resumed(tmp_path, partial(wan, **SMALL, store=store, tier=tier), call, 5)


@pytest.mark.parametrize("store", ["dense", "int8", "residual"])
def test_another_tier(store, tmp_path):
    """From the device to the disk, to the host and back; each save is of the tier that it is on."""

    def on(tier):
        return wan(**SMALL, store=store, tier=tier)

    def archive(stream):
        return next(iter(stream._run.sessions.values())).state().states[0].archive

    call = {**LATENTS, "num_frames": 77}
    expected = list(on("device").packforcing.stream(**call, generator=seeded()))
    stream, parts = on("device").packforcing.stream(**call, generator=seeded()), []
    for tier in ("disk", "host", "device"):
        parts += islice(stream, 3)
        stream.save(tmp_path)
        stream.close()
        stream = on(tier).packforcing.resume(tmp_path)
        assert archive(stream).tier == tier
    assert archive(stream).slots
    assert len(parts) == 9
    assert same([*parts, *stream], expected)


def test_another_tier_and_something_else(tmp_path):
    with wan(**SMALL).packforcing.stream(**CALL, num_frames=61, generator=seeded()) as stream:
        next(stream)
        stream.save(tmp_path)
    with pytest.raises(SnapshotError, match="enable the pipeline as it"):
        wan(**{**SMALL, "topk": 1}, tier="host").packforcing.resume(tmp_path)


@pytest.mark.parametrize("given", ["image", "video"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_beginning(given, at, tmp_path):
    begin = {"image": picture()} if given == "image" else {"video": clip(17)}
    check_resumed(tmp_path, wan, lambda: {**CALL, **begin, "num_frames": 61, "generator": seeded()}, at)


@pytest.mark.parametrize("output_type", ["latent", "pil", "np"])
def test_every_output_type(output_type, tmp_path):
    def call():
        return {**CALL, "num_frames": 45, "output_type": output_type, "generator": seeded()}

    pipe = wan()
    whole = list(pipe.packforcing.stream(**call()))
    stream = pipe.packforcing.stream(**call())
    next(stream)
    stream.save(tmp_path)
    rest = list(wan().packforcing.resume(tmp_path))
    for a, b in zip(whole[1:], rest, strict=True):
        assert [i.tobytes() for i in a[0]] == [i.tobytes() for i in b[0]] if output_type == "pil" else (a == b).all()


@pytest.mark.parametrize("scheduler", [FlowMatchFewStepScheduler, FlowMatchLCMScheduler])
@pytest.mark.parametrize(("seed", "at"), [(None, 0), (None, 2), (3, 2)])
def test_noise_that_nobody_seeded(scheduler, seed, at, tmp_path):
    """It comes from torch's own generator, or the few-step scheduler draws more from it."""

    def make():
        torch.manual_seed(7)
        return wan(scheduler=scheduler(sigmas=(1.0, 0.5)) if scheduler is FlowMatchFewStepScheduler else scheduler())

    def call():
        torch.manual_seed(7)
        return {**CALL, "num_frames": 45, **({} if seed is None else {"generator": seeded(seed)})}

    check_resumed(tmp_path, make, call, at)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("given", ["generator", "latents"])
def test_noise_of_ones_own_leaves_torchs_generator_alone(given, at, tmp_path):
    noise = seeded() if given == "generator" else torch.randn(1, 16, 12, 2, 4, generator=seeded())
    stream = wan().packforcing.stream(**CALL, num_frames=45, **{given: noise})
    list(islice(stream, at))
    stream.save(tmp_path)
    stream.close()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    list(wan().packforcing.resume(tmp_path))
    assert torch.equal(before, torch.get_rng_state())


def with_lora():
    pipe = wan()
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]), "one")
    generator = seeded(4)
    for name, weight in pipe.transformer.named_parameters():
        if "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return pipe


def test_lora(tmp_path):
    scale = {"attention_kwargs": {"scale": 0.5}}
    check_resumed(tmp_path, with_lora, lambda: {**CALL, **scale, "num_frames": 45, "generator": seeded()}, 3)


def test_lora_that_is_fused_between_two_snapshots(tmp_path):
    pipe = with_lora()
    stream = pipe.packforcing.stream(**CALL, num_frames=45, generator=seeded())
    for _ in range(2):
        next(stream)
        stream.save(tmp_path)
        pipe.transformer.fuse_lora()
    stream.rewind(0)
    whole = list(stream)
    stream.close()
    with pytest.raises(SnapshotError, match="of other weights or fused otherwise"):
        with_lora().packforcing.resume(tmp_path)
    fused = with_lora()
    fused.transformer.fuse_lora()
    for name, weight in fused.transformer.named_parameters():
        weight.data.copy_(pipe.transformer.get_parameter(name))  # it was fused twice
    assert same(list(fused.packforcing.resume(tmp_path)), whole)


def test_weights_that_change_between_two_snapshots(tmp_path):
    """As by `fuse_lora` and `unload_lora_weights`, behind which nothing of LoRA is left to be seen."""
    pipe = wan()
    stream = pipe.packforcing.stream(**CALL, num_frames=45, generator=seeded())
    next(stream)
    stream.save(tmp_path)
    for other in (pipe, changed := wan()):
        other.transformer.blocks[0].attn1.to_q.weight.data.mul_(1.5)
    next(stream)
    stream.save(tmp_path)
    whole = list(stream)
    stream.close()
    with pytest.raises(SnapshotError, match="another transformer"):
        wan().packforcing.resume(tmp_path)
    assert same(list(changed.packforcing.resume(tmp_path)), whole)


def test_lora_in_a_compiled_transformer_is_the_same(tmp_path):
    stream = with_lora().packforcing.stream(**CALL, num_frames=45, generator=seeded())
    next(stream)
    stream.save(tmp_path)
    compiled = with_lora()
    compiled.transformer = torch.compile(compiled.transformer, backend="eager")
    compiled.packforcing.resume(tmp_path).close()


def skyreels(**options):
    return quiet(tiny_skyreels_v2_pipeline(**options)).enable_packforcing("packforcing", **SMALL)


SKYREELS = {
    "text": ({}, {}),
    "image": (
        {"pipeline_class": SkyReelsV2DiffusionForcingImageToVideoPipeline},
        {"image": picture(), "last_image": picture(2)},
    ),
    "clip": (
        {"pipeline_class": SkyReelsV2DiffusionForcingVideoToVideoPipeline},
        {"video": clip(21), "overlap_history": 17},
    ),
}


@pytest.mark.parametrize("kind", SKYREELS)
@pytest.mark.parametrize("at", [1, 4])
def test_skyreels(kind, at, tmp_path):
    options, begin = SKYREELS[kind]
    frames = {"image": 53, "clip": 61, "text": 61}[kind]

    def call():
        return {**CALL, **BATCH, **begin, "height": 32, "num_frames": frames, "generator": row_seeds()}

    check_resumed(tmp_path, partial(skyreels, **options), call, at)


@pytest.mark.parametrize("given", [None, "video"])
@pytest.mark.parametrize("at", [1, 4])
def test_anyflow(given, at, tmp_path):
    def make():
        return quiet(tiny_anyflow_far_pipeline()).enable_packforcing("packforcing", topk=2, sink_frames=3)

    def call():
        begin = {"video": clip(13)} if given else {}
        text = {"prompt": CHANGES}
        return {**CALL, **begin, **text, "height": 32, "num_frames": 81, "generator": row_seeds()}

    check_resumed(tmp_path, make, call, at)


@pytest.mark.parametrize("at", [1, 4])
def test_sana_wm(at, tmp_path):
    def make():
        return quiet(tiny_sana_wm_refiner()).enable_packforcing("sana-wm")

    def call():
        raw = torch.randn(2, 4, 25, 2, 3, generator=seeded())
        seed = {"generator": seeded(1)} if at == 1 else {}
        return {"sana_latent": raw, "prompt": "the red circle", "fps": 16.0, "output_type": "latent", **seed}

    check_resumed(tmp_path, make, call, at)


def test_a_callback_is_given_again(tmp_path):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(step)
        return {"latents": tensors["latents"] * 1.01}

    def call():
        return {**CALL, "num_frames": 45, "generator": seeded(), "callback_on_step_end": callback}

    check_resumed(tmp_path, wan, call, 2, options={"callback_on_step_end": callback})
    assert len(seen) == 2 * 6 * 2  # two streams of six chunks


def test_again_and_again(tmp_path):
    """A snapshot behind every chunk, each resumed by another pipeline."""
    call = {**CALL, "num_frames": 61, "generator": seeded()}
    whole = list(wan().packforcing.stream(**{**call, "generator": seeded()}))
    stream, parts = wan().packforcing.stream(**call), []
    stream.save(tmp_path)  # before the first chunk
    while True:
        stream.close()
        stream = wan().packforcing.resume(tmp_path)
        chunk = next(stream, None)
        if chunk is None:
            break
        parts.append(chunk)
        stream.save(tmp_path)
    assert same(parts, whole)


def test_in_another_process(model, tmp_path, ready_python):
    pipe = helpers.quiet(kvpack_pipeline(model))
    call = {**CALL, "num_frames": 45}
    whole = list(pipe.packforcing.stream(**call, generator=seeded()))
    stream = pipe.packforcing.stream(**call, generator=seeded())
    parts = [next(stream), next(stream)]
    stream.save(tmp_path, note={"said": "by the first process"})
    code = f"""
import torch
from diffusers import WanPipeline
import kvpack
torch.set_num_threads(1)
pipe = WanPipeline.from_pretrained({str(model)!r})
pipe.set_progress_bar_config(disable=True)
pipe.enable_packforcing("packforcing", **{SMALL!r})
stream = pipe.packforcing.resume({str(tmp_path)!r})
assert stream.note == {{"said": "by the first process"}}
from safetensors.torch import save_file
save_file({{str(i): part for i, part in enumerate(stream)}}, {str(tmp_path / "rest.out")!r})
"""
    stream.close()
    done = ready_python(code)
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    rest = load_file(tmp_path / "rest.out")
    assert same([*parts, *(rest[str(index)] for index in range(len(rest)))], whole)


def kvpack_pipeline(model):
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(model).enable_packforcing("packforcing", **SMALL)
