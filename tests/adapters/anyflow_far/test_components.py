"""LoRA, offloading, dtypes, batches, copies and errors with an AnyFlow-FAR pipeline."""

import copy
from functools import partial

import pytest
import torch

from helpers import distance, generated, quiet, seeded
from kvpack.errors import NonFiniteLatentsError, UnsupportedPipelineError
from kvpack.testing import tiny_anyflow_far_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 32,
    "width": 48,
    "num_frames": 41,
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}


generate = partial(generated, **CALL)


@pytest.fixture
def pipe():
    return quiet(tiny_anyflow_far_pipeline()).enable_packforcing(sink_frames=1, recent_frames=3)


def test_lora_and_its_scale_also_in_the_commit(pipe):
    from peft import LoraConfig

    plain = generate(pipe)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "time_proj", "far_patch_embedding"]
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    with torch.no_grad():
        for name, weight in pipe.transformer.named_parameters():
            if "lora" in name:
                weight.copy_(torch.randn(weight.shape, generator=seeded(1)) / 4)
    full, half, none = (generate(pipe, attention_kwargs={"scale": scale}) for scale in (1.0, 0.5, 0.0))
    assert distance(full, plain) > 1e-2
    assert distance(half, full) > 1e-3
    assert torch.equal(generate(pipe), full)
    assert distance(none[:, :, :4], plain[:, :, :4]) < 1e-5  # nothing is compressed yet
    pipe.transformer.disable_adapters()
    assert distance(generate(pipe), plain) < 1e-5


def test_model_offload(pipe):
    frames = generate(pipe, output_type="pt", video=torch.rand(1, 5, 3, 32, 48, generator=seeded(2)))
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        again = generate(pipe, output_type="pt", video=torch.rand(1, 5, 3, 32, 48, generator=seeded(2)))
        assert torch.equal(again, frames)
    assert all(hasattr(module, "_hf_hook") for module in (pipe.text_encoder, pipe.transformer, pipe.vae))


def test_half_precision(pipe):
    wide = generate(pipe, num_frames=29, num_inference_steps=1)
    narrow = generate(pipe.to(torch.bfloat16), num_frames=29, num_inference_steps=1)
    assert narrow.dtype == torch.bfloat16
    assert distance(narrow.float(), wide) < 0.1


def test_rows_are_independent(pipe):
    prompts = ["a red circle", "night", "grass"]
    together = generate(pipe, prompt=prompts, generator=[seeded(row) for row in range(3)])
    for row, prompt in enumerate(prompts):
        assert distance(together[row], generate(pipe, prompt=prompt, generator=seeded(row))[0]) < 1e-5


def test_a_veto_is_for_rows_of_the_batch(pipe):
    made, prompts = [], ["a red circle", "night"]
    call = {"num_inference_steps": 1, "callback_on_step_end": lambda *_: made.append(1) or {}}
    pipe.enable_packforcing("token-trim", deviations=-100.0)  # vetoes every chunk once it knows three
    together = generate(pipe, prompt=prompts, generator=[seeded(row) for row in range(2)], **call)
    assert len(made) > 5
    for row, prompt in enumerate(prompts):
        assert distance(together[row], generate(pipe, prompt=prompt, generator=seeded(row), **call)[0]) < 1e-5


@pytest.mark.parametrize("stack", ["krea", "longlive", "infinity-rope", "framepack", "h2o"])
def test_other_memories(stack, pipe):
    schedule = [(0, "a red circle"), (1, "night", "cut")]
    call = {"prompt": schedule, "num_frames": 33, "num_inference_steps": 1}
    assert bool(generate(pipe.enable_packforcing(stack), **call).isfinite().all())


def test_copies(pipe):
    frames = generate(pipe)
    assert torch.equal(generate(copy.deepcopy(pipe)), frames)


def test_an_error_leaves_the_stock_pipeline_and_the_next_video_is_the_same(pipe):
    frames, stock = generate(pipe), [block.attn1.processor for block in pipe.transformer.blocks]

    def broken(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"] * torch.nan}

    with pytest.raises(NonFiniteLatentsError, match="chunk 0 holds NaN or infinity after denoising"):
        generate(pipe, callback_on_step_end=broken)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == stock
    assert not pipe.transformer._forward_pre_hooks
    assert pipe._progress_bar_config == {"disable": True}
    assert torch.equal(generate(pipe), frames)


def test_gradient_checkpointing_is_refused(pipe):
    pipe.transformer.enable_gradient_checkpointing()
    with pytest.raises(UnsupportedPipelineError, match="gradient checkpointing is enabled"):
        generate(pipe)


def test_a_pipeline_without_a_transformer_is_refused():
    pipe = tiny_anyflow_far_pipeline()
    pipe.transformer = None
    with pytest.raises(UnsupportedPipelineError, match="no transformer"):
        pipe.enable_packforcing()
