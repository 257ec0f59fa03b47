"""Another transformer commits: history is its keys and values, and that of the model itself if it has its weights."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from helpers import SMALL_CALL, clip, generated, quiet, seeded
from kvpack.errors import InvalidOptionError, SnapshotError, UnsupportedPipelineError
from kvpack.testing import tiny_anyflow_far_pipeline, tiny_wan_pipeline

CALL = {**SMALL_CALL, "num_frames": 45}


def wan(stack="full", **options):
    return quiet(tiny_wan_pipeline()).enable_packforcing(stack, chunk_frames=2, **options)


def copied(pipe, change=0.0):
    """The pipeline's transformer again, its weights changed."""
    writer = WanTransformer3DModel.from_config(pipe.transformer.config).eval()
    writer.load_state_dict(pipe.transformer.state_dict())
    generator = seeded(5)
    with torch.no_grad():
        for weight in writer.parameters():
            weight += change * weight.std().nan_to_num() * torch.randn(weight.shape, generator=generator)
    return writer


def history(pipe, **call):
    """Keys that each layer has behind two chunks that are given, and whether the transformer is stock again."""
    stream = pipe.packforcing.stream(**{**CALL, **call, "video": clip(13, 16)[..., :16].repeat(1, 1, 1, 1, 2)})
    _ = next(stream), next(stream)
    (session, *_) = pipe.packforcing.sessions.values()
    return [torch.cat([each.block.keys for each in state.whole], dim=1).clone() for state in session.past.states]


@pytest.mark.parametrize(
    ("stack", "options"),
    [("full", {}), ("packforcing", {"topk": 1, "compressor": "lr", "sink_frames": 2, "recent_frames": 2}), ("h2o", {})],
)
def test_a_writer_with_the_models_weights_changes_nothing(stack, options):
    prompt = [(0, "a red circle"), (1.5, "a blue square")]
    pipe = wan(stack, **options)
    wanted = generated(pipe, **{**CALL, "prompt": prompt})
    for writer in (pipe.transformer, copied(pipe)):
        pipe.packforcing.writer = writer
        assert torch.equal(generated(pipe, **{**CALL, "prompt": prompt}), wanted)
    pipe.packforcing.writer = copied(pipe, 0.3)
    other = generated(pipe, **{**CALL, "prompt": prompt})
    assert torch.equal(other[:, :5], wanted[:, :5])  # the first chunk has no history
    assert not torch.equal(other, wanted)
    pipe.packforcing.writer = None
    assert torch.equal(generated(pipe, **{**CALL, "prompt": prompt}), wanted)


def test_history_is_what_the_writer_makes_of_it():
    pipe, other = wan(), wan()
    writer = copied(pipe, 0.3)
    own = history(pipe)
    pipe.packforcing.writer = writer
    other.register_modules(transformer=writer)
    written = history(pipe)
    assert all(torch.equal(a, b) for a, b in zip(written, history(other), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(written, own, strict=True))


def test_both_transformers_are_stock_between_chunks():
    pipe = wan()
    pipe.packforcing.writer = writer = copied(pipe, 0.1)
    processors = [type(each) for each in writer.attn_processors.values()]
    stream = pipe.packforcing.stream(**CALL)
    _ = next(stream), next(stream)
    assert [type(each) for each in writer.attn_processors.values()] == processors
    assert [type(each) for each in pipe.transformer.attn_processors.values()] == processors


def test_a_snapshot_says_its_writer(tmp_path):
    pipe = wan()
    pipe.packforcing.writer = copied(pipe, 0.1)
    wanted = generated(pipe, **CALL)
    stream = pipe.packforcing.stream(**{**CALL, "generator": seeded()})
    made = [next(stream), next(stream)]
    stream.save(tmp_path)
    stream.close()
    pipe.enable_packforcing("full", chunk_frames=2)  # which keeps it
    made += list(pipe.packforcing.resume(tmp_path))
    assert torch.equal(torch.cat(made, dim=1), wanted)
    pipe.packforcing.writer = copied(pipe, 0.2)
    with pytest.raises(SnapshotError, match="ran with another writer than this"):
        pipe.packforcing.resume(tmp_path)
    pipe.packforcing.writer = None
    with pytest.raises(SnapshotError, match=r"ran with a writer; set pipe\.packforcing\.writer"):
        pipe.packforcing.resume(tmp_path)


def test_writers_that_cannot_work():
    pipe = wan()
    with pytest.raises(InvalidOptionError, match=r"the writer.s dtype is torch\.bfloat16, but that of the pipeline.s"):
        pipe.packforcing.writer = copied(pipe).to(torch.bfloat16)
    with pytest.raises(InvalidOptionError, match="the writer's num_layers is 1, but"):
        pipe.packforcing.writer = WanTransformer3DModel.from_config({**pipe.transformer.config, "num_layers": 1})
    with pytest.raises(InvalidOptionError, match="the writer's class is 'str'"):
        pipe.packforcing.writer = "memory"
    pipe = wan(commit="last-step")
    pipe.packforcing.writer = copied(pipe)
    with pytest.raises(InvalidOptionError, match="writer has no effect: full keeps what the last denoising step"):
        pipe(**CALL)
    far = tiny_anyflow_far_pipeline().enable_packforcing("full")
    with pytest.raises(UnsupportedPipelineError, match="anyflow-far commits with the pipeline's own transformer"):
        far.packforcing.writer = far.transformer


def test_compressors_embed_with_the_writer():
    pipe = wan("packforcing", topk=1, compressor="lr", sink_frames=2, recent_frames=2)
    writer, seen = copied(pipe, 0.1), []
    for each in (writer, pipe.transformer):
        each.patch_embedding.register_forward_hook(lambda module, *_: seen.append(module))
    generated(pipe, **CALL)
    forwards = len(seen)
    seen.clear()
    pipe.packforcing.writer = writer
    generated(pipe, **CALL)
    steps = 2 * CALL["num_inference_steps"] * pipe.packforcing.stats()["chunks"]  # of two guidance branches
    assert len(seen) == forwards
    assert sum(module is pipe.transformer.patch_embedding for module in seen) == steps  # all else is the writer's


def test_a_writer_set_between_two_saves_is_in_the_second(tmp_path):
    pipe = wan()
    stream = pipe.packforcing.stream(**CALL, generator=seeded())
    next(stream)
    stream.save(tmp_path)
    pipe.packforcing.writer = copied(pipe, 0.1)
    next(stream)
    stream.save(tmp_path)
    stream.close()
    pipe.packforcing.resume(tmp_path).close()
    pipe.packforcing.writer = None
    with pytest.raises(SnapshotError, match="writer"):
        pipe.packforcing.resume(tmp_path)
