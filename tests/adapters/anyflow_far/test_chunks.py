"""Videos of any length and beginning, errors by name, and what an AnyFlow-FAR pipeline is enabled with."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import quiet, seeded
from kvpack.errors import InvalidOptionError, NonFiniteLatentsError, UnsupportedPipelineError
from kvpack.media.video import VideoWriter
from kvpack.planning.presets import adapter_for, from_folder
from kvpack.policies import IdentityCompressor, NativeCompressor
from kvpack.testing import tiny_anyflow_far_pipeline, tiny_wan_pipeline

CALL = {
    "prompt": "a red circle",
    "height": 32,
    "width": 48,
    "num_inference_steps": 1,
    "max_sequence_length": 8,
    "output_type": "latent",
}


@pytest.fixture
def pipe():
    return quiet(tiny_anyflow_far_pipeline())


def lengths(pipe, **changed):
    """Latent frames of each chunk."""
    return [each.shape[2] for each in pipe.packforcing.stream(**{**CALL, "generator": seeded(), **changed})]


def test_a_name_gets_what_the_model_was_trained_with(pipe):
    stack = pipe.enable_packforcing(topk=3).packforcing.stack
    assert (stack.chunk_frames, stack.partitioner.sink_frames, stack.partitioner.recent_frames) == (3, 4, 6)
    assert isinstance(stack.compressor, NativeCompressor)
    assert (stack.selector.topk, stack.archive_blocks, stack.reindexer.train_frames) == (3, 32, 21)
    other = pipe.enable_packforcing(compressor="identity", sink_frames=7, archive_blocks=None).packforcing.stack
    assert isinstance(other.compressor, IdentityCompressor)
    assert (other.partitioner.sink_frames, other.selector.topk, other.archive_blocks) == (7, 5, None)
    assert pipe.enable_packforcing("full").packforcing.stack.chunk_frames == 3
    assert pipe.enable_packforcing("packforcing-paper").packforcing.stack.chunk_frames == 4  # it takes no option


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"num_frames": 81}, [1, 3, 3, 3, 3, 3, 3, 2]),  # the model's own
        ({"num_frames": 1}, [1]),
        ({"num_frames": 41}, [1, 3, 3, 3, 1]),
        ({"num_frames": 21, "chunk_partition": [2, 2, 2]}, [2, 2, 2]),
        ({"num_frames": 25, "chunk_partition": [3, 3, 1]}, [3, 3, 1]),
        ({"num_frames": 9, "chunk_partition": [1, 2]}, [1, 2]),
        ({"num_frames": 29, "video_latents": torch.ones(1, 2, 16, 4, 6)}, [2, 3, 3]),
        ({"num_frames": 29, "video_latents": torch.ones(1, 4, 16, 4, 6)}, [1, 3, 3, 1]),
        ({"num_frames": 21, "video_latents": torch.ones(1, 4, 16, 4, 6), "chunk_partition": [2, 2, 2]}, [2, 2, 2]),
    ],
)
def test_chunks(changed, wanted, pipe):
    pipe.enable_packforcing("full")
    assert lengths(pipe, **changed) == wanted


def test_the_first_chunk_may_be_chosen(pipe):
    pipe.enable_packforcing("full").packforcing.first_chunk_frames = 3
    assert lengths(pipe, num_frames=29) == [3, 3, 2]


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ([1, 3, 2, 3], "kvpack makes chunks of one length"),
        ([1, 3, 3, 4], "kvpack makes chunks of one length"),
        ([], "chunk_partition is empty"),
        (3, "chunk_partition must be a list of latent frames, got 3"),
        ([1, 0], "chunk_partition must be >= 1, got 0"),
        ([1, 3], r"\[1, 3\] sums to 4, but the video has 5 latent frames"),
    ],
)
def test_a_partition_that_cannot_be(partition, message, pipe):
    pipe.enable_packforcing("full")
    with pytest.raises(InvalidOptionError, match=message):
        pipe(**CALL, num_frames=17, chunk_partition=partition)


def test_a_partition_must_end_where_what_is_given_ends(pipe):
    """Upstream counts the chunk as given, and leaves the rest of it zero."""
    call = {**CALL, "num_frames": 17, "chunk_partition": [1, 2, 2], "video_latents": torch.ones(1, 2, 16, 4, 6)}
    assert not pipe(**call).frames[:, :, 2].any()
    pipe.enable_packforcing("full")
    with pytest.raises(InvalidOptionError, match="2 latent frames, which end inside a chunk of chunk_partition"):
        pipe(**call)
    assert pipe(**{**call, "chunk_partition": None}).frames[:, :, 2].any()


def test_an_endless_video_has_no_partition(pipe):
    pipe.enable_packforcing("full")
    with pytest.raises(InvalidOptionError, match="but the video has no end"):
        pipe.packforcing.stream(**CALL, chunk_partition=[1, 3, 3])
    stream = pipe.packforcing.stream(**CALL)
    assert [next(stream).shape[2] for _ in range(12)] == [1] + [3] * 11


def test_a_clip_of_any_kind(pipe, tmp_path):
    pipe.enable_packforcing("full")
    clip = torch.rand(9, 3, 32, 48, generator=seeded(1)).mul(255).byte()
    arrays = clip.permute(0, 2, 3, 1).numpy()
    with VideoWriter(tmp_path / "clip.mp4", 16) as writer:
        writer.write(arrays)
    wanted = pipe(**CALL, num_frames=17, generator=seeded(), video=clip[None].float() / 255).frames
    for given in (clip, arrays, list(map(Image.fromarray, arrays))):
        found = pipe(**CALL, num_frames=17, generator=seeded(), video=given).frames
        torch.testing.assert_close(found, wanted)
    assert (
        pipe(**CALL, num_frames=17, generator=seeded(), video=str(tmp_path / "clip.mp4")).frames.shape == wanted.shape
    )


def test_wrong_beginnings(pipe):
    pipe.enable_packforcing("full")
    with pytest.raises(InvalidOptionError, match=r"video_latents must be .*, got ndarray"):
        pipe(**CALL, video_latents=np.ones((1, 1, 16, 4, 6)))
    with pytest.raises(InvalidOptionError, match=r"video_latents must be \[batch, frames, 16 channels, 4, 6\], got"):
        pipe(**CALL, video_latents=torch.ones(1, 16, 1, 4, 6))
    with pytest.raises(InvalidOptionError, match="what is given has 5 latent frames, but the whole video has 5"):
        pipe(**CALL, num_frames=17, video_latents=torch.ones(1, 5, 16, 4, 6))
    with pytest.raises(NonFiniteLatentsError, match="video or video_latents hold NaN"):
        pipe(**CALL, video_latents=torch.full((1, 1, 16, 4, 6), torch.nan))
    with pytest.raises(ValueError, match="not both"):
        pipe(**CALL, video=torch.ones(1, 1, 3, 32, 48), video_latents=torch.ones(1, 1, 16, 4, 6))


def test_a_stack_of_another_length_is_fitted_or_refused(pipe, caplog):
    pipe.enable_packforcing("self-forcing", chunk_frames=2)
    assert lengths(pipe, num_frames=29, chunk_partition=[1, 3, 3, 1]) == [1, 3, 3, 1]
    assert not caplog.messages
    assert lengths(pipe, num_frames=29) == [1, 3, 3, 1]
    assert "the 3 latent frames of the model's chunk_partition, not the 2 of the stack" in caplog.text
    pipe.enable_packforcing("self-forcing", chunk_frames=2, window_frames=4, sink_frames=0)
    with pytest.raises(InvalidOptionError, match="chunk_partition 3 does not go with the chunks of"):
        pipe(**CALL, num_frames=29)


def test_interrupt_ends_the_video_behind_its_chunk(pipe):
    def callback(pipeline, step, timestep, tensors):
        calls.append(step)
        pipeline._interrupt = len(calls) == 2
        return {}

    calls = []
    pipe.enable_packforcing("full")
    assert pipe(**CALL, num_frames=81, callback_on_step_end=callback).frames.shape[2] == 4


def test_one_bar_for_the_whole_video(pipe, capsys):
    pipe.set_progress_bar_config(desc="video", mininterval=0)
    pipe.enable_packforcing("full")
    pipe(**{**CALL, "num_frames": 29, "num_inference_steps": 2})
    bars = capsys.readouterr().err
    assert "8/8" in bars
    assert "Chunk" not in bars
    assert pipe._progress_bar_config == {"desc": "video", "mininterval": 0}


def test_a_later_prompt_is_heard(pipe):
    schedule = [(0, "a red circle"), (1, "night")]
    pipe.enable_packforcing("self-forcing")
    call = {**CALL, "num_frames": 41, "guidance_scale": 2.0}
    plain, changed = (pipe(**{**call, "prompt": p, "generator": seeded()}).frames for p in ("a red circle", schedule))
    assert torch.equal(plain[:, :, :4], changed[:, :, :4])
    assert not torch.equal(plain[:, :, 4:7], changed[:, :, 4:7])


def test_training_is_refused(pipe):
    adapter = pipe.enable_packforcing()._kvpack.adapter
    with pytest.raises(UnsupportedPipelineError, match="anyflow-far cannot train yet"):
        adapter.trainee(pipe)
    assert adapter.model_cost({}, 32, 32) is None


def test_a_saved_pipeline_is_planned_for_and_loads_as_stock(pipe, tmp_path):
    pipe.enable_packforcing().save_pretrained(tmp_path)
    model = from_folder(tmp_path)
    adapter = adapter_for(model)
    assert adapter.name == "anyflow-far"
    assert adapter.geometry(model.configs, 32, 48, torch.float32).grid == (2, 3)
    assert adapter.latent_shape(model.configs).native == (2, 2)
    again = type(pipe)._kvpack_base.from_pretrained(tmp_path).enable_packforcing()
    again.set_progress_bar_config(disable=True)
    assert lengths(again, num_frames=13) == [1, 3]


def test_other_models_have_no_native_embedding():
    with pytest.raises(InvalidOptionError, match="the model's own embedding for compressed frames, but this model has"):
        tiny_wan_pipeline().enable_packforcing(compressor="native")
