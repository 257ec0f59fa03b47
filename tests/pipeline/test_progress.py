"""What a program is told while a video is generated: a callback behind each chunk, the log, and what prints as text."""

import logging
import os
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingImageToVideoPipeline, SkyReelsV2DiffusionForcingVideoToVideoPipeline

import kvpack
from helpers import clip, picture, quiet, seeded
from kvpack.errors import InvalidOptionError
from kvpack.pipeline.progress import Progress
from kvpack.testing import (
    tiny_anyflow_far_pipeline,
    tiny_sana_wm_refiner,
    tiny_skyreels_v2_pipeline,
    tiny_wan_pipeline,
)

CALL = {
    "prompt": "a red circle",
    "height": 16,
    "width": 32,
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
}
WINDOW = {"chunk_frames": 2, "window_frames": 4, "sink_frames": 1}


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline()).enable_packforcing("self-forcing", **WINDOW)


@pytest.mark.parametrize("output_type", ["latent", "pt"])
@pytest.mark.parametrize("streams", [True, False])
def test_a_callback_is_told_of_each_chunk(streams, output_type, pipe):
    told, held = [], []

    def on_chunk(progress):
        told.append(progress)
        held.append(pipe.packforcing.stats()["resident_bytes"])

    call = {**CALL, "num_frames": 21, "output_type": output_type, "on_chunk": on_chunk}
    made = list(pipe.packforcing.stream(**call)) if streams else [pipe(**call).frames]
    assert [each.chunk for each in told] == [0, 1, 2]
    assert [each.frames for each in told] == [5, 13, 21]
    assert {each.chunks for each in told} == {3}
    assert told[-1].video_seconds == 21 / 16
    assert [each.resident_bytes for each in told] == held
    assert all(each.seconds > 0 for each in told)
    assert told[1].fps == pytest.approx(8 / told[1].seconds)
    assert told[0].attended_bytes < told[2].attended_bytes
    if output_type == "pt":
        assert sum(part.shape[1] for part in made) == 21


def test_a_callback_changes_nothing(pipe):
    call = {**CALL, "num_frames": 21, "output_type": "latent"}
    plain = pipe(**call, generator=seeded()).frames
    assert torch.equal(pipe(**call, generator=seeded(), on_chunk=lambda _: None).frames, plain)
    with pytest.raises(InvalidOptionError, match=r"on_chunk is called with a Progress.* got 3"):
        pipe(**call, on_chunk=3)
    with pytest.raises(InvalidOptionError, match="got 'print'"):
        pipe.packforcing.stream(**call, on_chunk="print")
    pipe.disable_packforcing()
    with pytest.raises(TypeError, match="on_chunk"):
        pipe(**call, on_chunk=print)


def test_an_endless_video_has_no_count(pipe):
    told = []
    with pipe.packforcing.stream(**CALL, output_type="latent", on_chunk=told.append) as stream:
        next(stream)
    assert [each.chunks for each in told] == [None]


def test_an_error_of_the_callback_ends_the_generation(pipe):
    def on_chunk(progress):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        pipe(**CALL, num_frames=21, on_chunk=on_chunk)
    assert pipe.packforcing.sessions == {}


def test_a_copy_made_by_the_callback_is_free(pipe):
    copies = []
    call = {**CALL, "num_frames": 13, "output_type": "latent"}
    wanted = pipe(**call, generator=seeded(), on_chunk=lambda _: copies.append(deepcopy(pipe))).frames
    for twin in copies:
        assert torch.equal(twin(**call, generator=seeded()).frames, wanted)
        assert "_kvpack_thread" not in vars(twin.transformer)


def test_every_family_counts_its_frames():
    pipe = quiet(tiny_anyflow_far_pipeline()).enable_packforcing("full", chunk_frames=3)
    told = []
    pipe(**CALL, num_frames=25, output_type="latent", on_chunk=told.append)
    assert [each.frames for each in told] == [1, 13, 25]
    pipe, told = quiet(tiny_sana_wm_refiner()).enable_packforcing("full", chunk_frames=2), []
    latent = torch.randn(1, 4, 5, 2, 2, generator=seeded())
    call = {"prompt": "a red circle", "sana_latent": latent, "fps": 24.0, "block_size": 2, "on_chunk": told.append}
    pipe(**call, output_type="latent")
    frames = pipe(**call, output_type="pt")  # without as many as sink_size says, as upstream
    assert [each.frames for each in told] == [17, 33, 16, 32]
    assert told[-1].frames == len(frames)


@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_frames_are_those_that_the_call_returns(output_type):
    """A clip that they have in front of them is among them; latents of an image that they end with are not."""
    call = {**CALL, "width": 16, "causal_block_size": 3, "output_type": output_type}
    told = []

    def made(kind, **given):
        told.clear()
        pipe = quiet(tiny_skyreels_v2_pipeline(pipeline_class=kind)).enable_packforcing()
        return pipe(**call, **given, on_chunk=told.append).frames

    video = made(SkyReelsV2DiffusionForcingVideoToVideoPipeline, video=clip(13, 16), overlap_history=9, num_frames=21)
    assert [each.frames for each in told] == ([9, 21] if output_type == "latent" else [22, 34])
    assert told[-1].fps == pytest.approx(12 / told[-1].seconds)
    assert output_type == "latent" or told[-1].frames == video.shape[1]
    given = {"image": picture(16), "last_image": picture(16, 2), "num_frames": 21}
    made(SkyReelsV2DiffusionForcingImageToVideoPipeline, **given)
    assert [each.frames for each in told] == [1, 13, 21]


def test_the_log_has_a_line_a_chunk(pipe, caplog):
    pipe(**CALL, num_frames=21)
    assert not caplog.messages
    kvpack.logging.set_verbosity_info()
    told = []
    pipe(**CALL, num_frames=21, on_chunk=told.append)
    assert caplog.messages == [str(each) for each in told]
    assert {record.name for record in caplog.records} == {"kvpack.pipeline.progress"}
    kvpack.logging.set_verbosity_error()
    pipe(**CALL, num_frames=20)  # no number of frames that a VAE has
    assert len(caplog.messages) == 3


def test_progress_reads_as_a_line():
    progress = Progress(4, 10, 57, 3.5625, 2.0, 6.0, 12_500_000, 1_000_000, 27_000_000)
    assert str(progress) == "chunk 5/10, 3.56 s of video: 6 frames/s, 12.5 MB attended, 27 MB held"


@pytest.mark.parametrize(("program", "lines"), [("", 1), ("logging.basicConfig()", 1), ("", 0)])
def test_what_is_logged_is_seen_once(program, lines):
    code = f"import logging; {program or 'pass'}; import kvpack; kvpack.logging.get_logger('kvpack.a').info('seen')"
    level = "info" if lines else "warning"
    environment = {**os.environ, "KVPACK_VERBOSITY": level}
    if program:
        code = code.replace("basicConfig()", "basicConfig(level=logging.INFO)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == ""
    assert done.stderr.count("seen") == lines
    assert logging.getLogger("kvpack").propagate


def test_repr_says_what_is_enabled_and_how_far_it_is(pipe):
    text = "<packforcing of WanPipeline: self-forcing, chunks of 2 latent frames, 16 fps; "
    assert repr(pipe.packforcing) == text + "nothing generated yet>"
    stream = pipe.packforcing.stream(**CALL, num_frames=21)
    next(stream)
    next(stream)
    assert repr(pipe.packforcing).startswith(text + "2 chunks of 3 are committed, 0.0")
    assert repr(pipe.packforcing).endswith(" MB held>")
    stream.close()
    assert repr(pipe.packforcing) == text + "the last generation had 2 chunks>"
