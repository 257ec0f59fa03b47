"""Frames that are decoded while the next chunk is denoised."""

import itertools
import threading

import pytest
import torch

from helpers import SMALL, SMALL_CALL, quiet, seeded
from kvpack.adapters.wan import vae
from kvpack.errors import InvalidOptionError, SnapshotError, UnsupportedPipelineError
from kvpack.testing import tiny_wan_pipeline


@pytest.fixture
def pipe():
    return quiet(tiny_wan_pipeline()).enable_packforcing("packforcing", **SMALL)


def stream(pipe, frames=29, **changed):
    return pipe.packforcing.stream(**{**SMALL_CALL, "num_frames": frames, "generator": seeded(), **changed})


@pytest.mark.parametrize("frames", [29, 45])
def test_the_same_frames_chunk_by_chunk(frames, pipe):
    wanted, told = list(stream(pipe, frames)), []
    made = list(stream(pipe, frames, decode_device="cpu", on_chunk=told.append))
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert [each.frames for each in told][-1] == frames


def test_a_chunk_is_decoded_while_the_next_is_denoised(pipe, monkeypatch):
    """Decoding waits here for the next chunk to begin, which would never be without a thread."""
    began, decoded, count = [threading.Event() for _ in range(9)], [], itertools.count()
    decode, main = vae.StreamingDecoder.__call__, threading.get_ident()

    def waiting(self, latents):
        assert threading.get_ident() != main
        index = next(count)
        decoded.append(index)
        assert began[index + 1].wait(timeout=60)
        return decode(self, latents)

    monkeypatch.setattr(vae.StreamingDecoder, "__call__", waiting)

    def begin(_, step, __, kwargs):
        if step == 0:
            next(each for each in began if not each.is_set()).set()
        return kwargs

    chunks = stream(pipe, None, decode_device="cpu", callback_on_step_end=begin)
    assert next(chunks).shape[1] == 5
    assert began[1].is_set()
    began[2].set()
    chunks.close()
    assert threading.active_count() == 1 or not any("kvpack" in each.name for each in threading.enumerate())


def test_a_decoder_that_fails_raises_in_the_stream(pipe, monkeypatch):
    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(vae.StreamingDecoder, "__call__", broken)
    with pytest.raises(MemoryError, match="no room"):
        next(stream(pipe, decode_device="cpu"))


def test_a_copy_of_the_vae_decodes_elsewhere(pipe):
    chunks = stream(pipe, decode_device="meta")
    assert chunks._run._decode.vae.device.type == "meta"
    assert pipe.vae.device.type == "cpu"
    chunks.close()


def test_what_is_refused(pipe):
    with pytest.raises(InvalidOptionError, match="nothing to decode"):
        stream(pipe, decode_device="cpu", output_type="latent")
    with pytest.raises(InvalidOptionError, match="must be a device"):
        stream(pipe, decode_device="somewhere")
    with stream(pipe, decode_device="cpu") as chunks:
        next(chunks)
        for act in (lambda: chunks.save("anywhere"), chunks.fork):
            with pytest.raises(SnapshotError, match="a chunk ahead"):
                act()
    pipe.enable_packforcing("packforcing", **SMALL, compressor="dual")
    with pytest.raises(InvalidOptionError, match="looks at a chunk's frames"):
        stream(pipe, decode_device="cpu")
    pipe.enable_packforcing("packforcing", **SMALL)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(UnsupportedPipelineError, match="stays where it is"):
        stream(pipe, decode_device="cpu")


def test_a_chunk_that_was_made_is_handed_out_before_the_error_of_the_next(pipe):
    wanted = list(stream(pipe))

    def fail(_, step, __, kwargs):
        fail.steps += 1
        if fail.steps > 2 * SMALL_CALL["num_inference_steps"]:
            raise ZeroDivisionError
        return kwargs

    fail.steps = 0
    chunks = stream(pipe, decode_device="cpu", callback_on_step_end=fail)
    assert torch.equal(next(chunks), wanted[0])
    assert torch.equal(next(chunks), wanted[1])
    with pytest.raises(ZeroDivisionError):
        next(chunks)
