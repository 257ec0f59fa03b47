"""`pipe.packforcing.trace(path)`: a line of JSON behind every chunk, and nothing else is different."""

import json
import os

import pytest
import torch

from helpers import enable_small, generated, quiet, seeded
from kvpack.errors import OutputError
from kvpack.pipeline import trace as tracing
from kvpack.testing import tiny_wan_pipeline

CALL = {"prompt": "a red circle", "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
CHUNKS = 12


@pytest.fixture
def pipe():
    return enable_small(quiet(tiny_wan_pipeline()))


def generate(pipe, **changed):
    return generated(pipe, **{**CALL, "num_frames": 8 * CHUNKS - 3, **changed})  # chunks of 2 latent frames


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_each_chunk_and_the_very_latents(pipe, tmp_path):
    before = generate(pipe)
    pipe.packforcing.trace(tmp_path / "t.jsonl")
    assert torch.equal(generate(pipe), before)
    head, *chunks = lines(tmp_path / "t.jsonl")
    assert (head["stack"], head["prompt"], head["seconds_a_frame"]) == ("packforcing", "a red circle", 0.25)
    assert [chunk["chunk"] for chunk in chunks] == list(range(CHUNKS))
    assert [chunk["first_frame"] for chunk in chunks] == list(range(0, 2 * CHUNKS, 2))
    stats = pipe.packforcing.stats()
    assert sum(chunks[-1]["bytes"].values()) == stats["resident_bytes"]
    for phase, seconds in stats["seconds"].items():
        assert sum(chunk["seconds"][phase] for chunk in chunks) == pytest.approx(seconds, abs=1e-4)
    assert chunks[0]["drift"] == 0
    assert chunks[0]["contrast"] == pytest.approx(1)
    assert all(chunk["drift"] > 0 for chunk in chunks[1:])
    assert {chunk["picture"] for chunk in chunks} == {None}


def test_an_archive_on_another_tier_leaves_the_room_as_it_is(pipe, tmp_path):
    found = {}
    for tier in ("device", "host"):
        enable_small(pipe, tier=tier).packforcing.trace(tmp_path / "t.jsonl")
        generate(pipe)
        found[tier] = lines(tmp_path / "t.jsonl")[-1]["bytes"]
        held = pipe.packforcing.stats()["resident_bytes"]
        assert sum(found[tier].values()) == held + (tier == "host") * found[tier]["archive"]
    assert found["host"]["archive"] > 0
    assert found["host"]["room"] > 0


def test_what_is_attended_is_what_the_session_attends(pipe, tmp_path):
    seen = []

    def look(pipe, step, timestep, tensors):
        if step == 1:
            session = pipe.packforcing.sessions["cond"]
            selected = [cache.selected for cache in session.caches]
            seen.append((session.plan, selected, [session.attended(layer)[0].shape[1] for layer in range(2)]))
        return tensors

    pipe.packforcing.trace(tmp_path / "t.jsonl")
    generate(pipe, callback_on_step_end=look)
    chunks = lines(tmp_path / "t.jsonl")[1:]
    for chunk, (plan, selected, tokens) in zip(chunks, seen, strict=True):
        for layer, told in enumerate(chunk["attended"]):
            assert told["tokens"] == tokens[layer]
            picked = range(len(plan.mid)) if selected[layer] is None else selected[layer][0].tolist()
            wanted = {frame for i in picked for frame in range(plan.mid[i].first_frame, plan.mid[i].stop)}
            wanted |= {frame for piece in plan.ledger.whole for frame in range(piece.first_frame, piece.stop)}
            frames = [frame for first, count, _ in told["frames"] for frame in range(first, first + count)]
            assert sorted(frames) == sorted(wanted)
            assert told["chunk_start"] >= max(start + length for start, length in told["positions"] or [(0, 0)])
    parts = {part for _, _, part in chunks[-1]["attended"][0]["frames"]}
    assert parts == {"sink", "mid", "recent"}


def test_lines_do_not_grow_with_the_video(pipe, tmp_path):
    pipe.enable_packforcing("full", chunk_frames=2)
    pipe.packforcing.trace(tmp_path / "t.jsonl")
    generate(pipe)
    sizes = [len(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()[2:]]
    assert max(sizes) < 1.2 * min(sizes)
    assert lines(tmp_path / "t.jsonl")[-1]["attended"][0]["frames"] == [[0, 2 * CHUNKS - 2, "recent"]]


def test_ranges_are_bounded(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "RANGES", 2)
    pipe.packforcing.trace(tmp_path / "t.jsonl")
    generate(pipe)
    told = lines(tmp_path / "t.jsonl")[-1]["attended"][0]
    assert (len(told["frames"]), told["left_out"]) == (2, 1)


def test_a_memory_that_keeps_tokens_tells_their_positions(pipe, tmp_path):
    pipe.enable_packforcing("h2o", chunk_frames=2)
    pipe.packforcing.trace(tmp_path / "t.jsonl")
    generate(pipe)
    told = lines(tmp_path / "t.jsonl")[-1]["attended"][0]
    assert "frames" not in told
    assert told["positions"]
    assert told["tokens"] > 0


def test_of_a_memory_with_windows_by_head_positions_are_those_of_all(pipe, tmp_path):
    windows = {"windows": [4, 8], "sinks": [1], "shares": [[0, 1]]}
    pipe.enable_packforcing("mixed-windows", chunk_frames=2, **windows).packforcing.trace(tmp_path / "t.jsonl")
    generate(pipe, num_frames=45)
    last = lines(tmp_path / "t.jsonl")[-1]
    long = [0, *range(last["first_frame"] - 5, last["first_frame"])]
    assert last["attended"][0]["positions"] == [[0, 0], [long[1], 4]]


def test_drift_is_from_the_first_chunk_wherever_a_generation_goes_on(pipe, tmp_path):
    """Also where its beginning was not traced."""
    pipe.packforcing.trace(tmp_path / "t.jsonl")

    def drift(stream):
        for _ in stream:
            pass
        return {each["chunk"]: (each["drift"], each["contrast"]) for each in lines(tmp_path / "t.jsonl")[1:]}

    call = {**CALL, "num_frames": 37}
    whole = drift(pipe.packforcing.stream(**call, generator=seeded()))
    pipe.packforcing.trace(None)
    stream = pipe.packforcing.stream(**call, generator=seeded())
    for _ in range(3):
        next(stream)
    stream.save(tmp_path / "saved")
    pipe.packforcing.trace(tmp_path / "t.jsonl")
    wanted = {chunk: whole[chunk] for chunk in (3, 4)}
    assert drift(stream.fork()) == wanted
    stream.close()
    assert drift(pipe.packforcing.resume(tmp_path / "saved")) == wanted


def test_a_stream_has_pictures_and_what_was_written_stays(pipe, tmp_path):
    pipe.packforcing.trace(tmp_path / "t.jsonl")
    stream = pipe.packforcing.stream(**{**CALL, "output_type": "np"})
    for _ in range(3):
        next(stream)
    stream.close()
    chunks = lines(tmp_path / "t.jsonl")[1:]
    assert len(chunks) == 3
    assert all(chunk["picture"].startswith("data:image/jpeg;base64,") for chunk in chunks)


def test_a_trace_goes_into_a_pipe(pipe):
    reads, writes = os.pipe()
    pipe.packforcing.trace(f"/dev/fd/{writes}")
    generate(pipe, num_frames=17)
    os.close(writes)
    with os.fdopen(reads) as file:
        head, *chunks = [json.loads(line) for line in file]
    assert "chunk" not in head
    assert [each["chunk"] for each in chunks] == list(range(len(chunks)))


def test_an_image_that_is_given_has_a_line(pipe, tmp_path):
    pipe.packforcing.trace(tmp_path / "t.jsonl")
    generate(pipe, image=torch.rand(3, 32, 32), num_frames=17)
    chunks = lines(tmp_path / "t.jsonl")[1:]
    assert chunks[0]["attended"] == []
    assert chunks[1]["attended"][0]["frames"] == [[0, 1, "sink"]]


def test_it_is_kept_by_another_memory_and_ended_by_none(pipe, tmp_path):
    pipe.packforcing.trace(str(tmp_path / "t.jsonl"))
    enable_small(pipe)
    generate(pipe, num_frames=9)
    assert len(lines(tmp_path / "t.jsonl")) == 3
    (tmp_path / "t.jsonl").unlink()
    pipe.packforcing.trace(None)
    generate(pipe, num_frames=9)
    assert not (tmp_path / "t.jsonl").exists()


def test_a_file_that_cannot_be_written(pipe, tmp_path):
    with pytest.raises(OutputError, match=r"cannot write the trace .*absent is no directory; make it first"):
        pipe.packforcing.trace(tmp_path / "absent" / "t.jsonl")
    generate(pipe, num_frames=9)
    (tmp_path / "later").mkdir()
    pipe.packforcing.trace(tmp_path / "later" / "t.jsonl")
    (tmp_path / "later").rmdir()
    with pytest.raises(OutputError, match=r"cannot write the trace .*; give trace\(\) a file .*, or None"):
        generate(pipe)
    pipe.packforcing.trace(None)
    generate(pipe, num_frames=9)
