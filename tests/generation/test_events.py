"""Prompts that change, scenes that are cut, chunks that are vetoed: what is kept, computed anew and placed where."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers import context, held, ledger, quiet, seeded, state, twins
from kvpack.adapters.wan import denoiser as wan_denoiser
from kvpack.adapters.wan.vae import StreamingDecoder
from kvpack.errors import InvalidOptionError
from kvpack.generation.denoiser import Denoiser
from kvpack.generation.prompts import Shot, shots
from kvpack.memory import StateMemory
from kvpack.memory.session import Session
from kvpack.plugins.registry import registry
from kvpack.policies import InfinityRoPE, Krea, LongLive, TokenTrim, infinite_forcing, packforcing, self_forcing
from kvpack.testing import TINY, check_memory, run_session, tiny_wan_pipeline

FRAME = TINY.tokens_per_frame
CALL = {
    "height": 32,
    "width": 48,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 16,
    "output_type": "latent",
}
FOX, DOG = "a fox", "a red dog runs"


def pipeline(stack, **options):
    return quiet(tiny_wan_pipeline()).enable_packforcing(stack, **options)


def generate(pipe, prompt, frames=12, **call):
    call = {**CALL, "generator": seeded(), **call}
    return pipe(prompt=prompt, num_frames=4 * frames - 3, **call).frames


def forward(session, frames=None):
    """Random keys and values through every layer of a session, whose step or commit was announced."""
    count = (session.stack.chunk_frames if frames is None else frames) * FRAME
    for layer in session.layers:
        q, k, v = torch.randn(3, 1, count, TINY.heads, TINY.head_dim, generator=seeded(count))
        layer.attend(q, k, v, lambda q, k, v: q)


def attended_frames(session):
    """Temporal positions of the history that a state session attends, and of the chunk's first frame."""
    attended = context(session)
    places = [frame for part in attended.tokens for frame in part.coordinates[0, ::FRAME, 0].tolist()]
    return places, attended.chunk_start


def replay(session):
    """What a pipeline does under a new prompt, with random numbers."""
    plan = session.replays()
    session.rewind(sum(plan))
    for frames in plan:
        session.commit((), torch.zeros(1, 16, frames, 8, 12))
        forward(session, frames)
        session.finish_commit()
    return plan


# Schedules


def test_a_prompt_is_a_schedule_if_it_has_times():
    assert shots(FOX) == [Shot(0.0, FOX)]
    assert shots([FOX, DOG]) == [Shot(0.0, [FOX, DOG])]
    assert shots(None) == [Shot(0.0, None)]
    assert shots([(0, FOX), (2.5, DOG, "cut")]) == [Shot(0.0, FOX), Shot(2.5, DOG, True)]


def test_a_schedule_may_come_out_of_json():
    schedule = [(0, FOX), (2.5, DOG, "cut")]
    assert shots(json.loads(json.dumps(schedule))) == shots(schedule)
    rows = [(0, [FOX, DOG]), (1, [DOG, FOX])]
    assert shots(json.loads(json.dumps(rows))) == shots(rows)
    pipe = pipeline("self-forcing", chunk_frames=1, window_frames=3, sink_frames=1)
    assert torch.equal(generate(pipe, [[0, FOX], [0.5, DOG]], 6), generate(pipe, [(0, FOX), (0.5, DOG)], 6))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[1, FOX]], r"begins at 0 seconds, got 1"),
        ([[FOX, DOG]], r"seconds >= 0, got 'a fox'"),
        ([[0, FOX], []], r"\(seconds, prompt\), got \[\]"),
        ([(1, FOX)], r"begins at 0 seconds, got 1"),
        ([(0, FOX), (0, DOG)], r"seconds of a prompt schedule ascend, got 0 behind 0"),
        ([(0, FOX), DOG], r"\(seconds, prompt\), got 'a red dog runs'"),
        ([(0, FOX), (float("nan"), DOG)], r"seconds >= 0, got nan"),
        ([(0, FOX), (True, DOG)], r"seconds >= 0, got True"),
        ([(0, FOX), (2, 3)], r"a list of texts for a batch, or embeddings \[batch, tokens, width\], got 3"),
        ([(0, FOX), (2, DOG, "fade")], r'"cut" or not there, got \'fade\''),
        ([(0, FOX), (2, [FOX, DOG])], r"of one batch, got batches of \[1, 2\]"),
    ],
)
def test_a_wrong_schedule_says_what_would_be_right(prompt, message):
    with pytest.raises(InvalidOptionError, match=message):
        generate(pipeline("self-forcing"), prompt)


def test_a_shot_begins_with_the_nearest_chunk():
    # Chunks of four latent frames begin at pixel frames 0, 13, 29, 45, ...
    chunks = [Shot(frame / 16, "").chunk(16.0, 4, 4) for frame in (0, 1, 6, 13, 20, 22, 29)]
    assert chunks == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("name", sorted(registry().stacks))
def test_every_stack_hears_a_new_prompt_from_its_chunk_on(name):
    pipe = pipeline(name)
    frames = pipe.packforcing.stack.chunk_frames
    seconds = (4 * 2 * frames - 3) / 16  # where the third chunk begins
    plain = generate(pipe, FOX, 4 * frames)
    turned = generate(pipe, [(0, FOX), (seconds, DOG)], 4 * frames)
    assert torch.equal(plain[:, :, : 2 * frames], turned[:, :, : 2 * frames])
    assert not torch.allclose(plain[:, :, 2 * frames :], turned[:, :, 2 * frames :], atol=1e-2)
    assert torch.equal(turned, generate(pipe, [(0, FOX), (seconds, DOG)], 4 * frames))


def test_a_stream_takes_the_next_prompt():
    pipe = pipeline("packforcing", topk=2, sink_frames=2, recent_frames=2, chunk_frames=2)
    scheduled = generate(pipe, [(0, FOX), (13 / 16, DOG), (29 / 16, FOX)], 8)
    stream = pipe.packforcing.stream(FOX, num_frames=29, generator=seeded(), **CALL)
    parts = [next(stream), next(stream), stream.send(DOG), next(stream)]
    assert torch.equal(torch.cat(parts, dim=2)[:, :, :6], scheduled[:, :, :6])
    with pytest.raises(StopIteration):
        stream.send(FOX)
    assert pipe.packforcing.sessions == {}


@pytest.mark.parametrize("name", ["infinity-rope", "krea", "longlive", "packforcing"])
def test_a_cut_under_the_prompt_in_force_is_that_prompt_spoken_again(name):
    pipe = pipeline(name)
    frames = 4 * pipe.packforcing.stack.chunk_frames

    def after(turn):
        with pipe.packforcing.stream(FOX, num_frames=4 * frames - 3, generator=seeded(), **CALL) as stream:
            return [next(stream), next(stream), turn(stream), next(stream)][2:]

    cut, spoken, plain = (
        after(lambda stream: stream.send(None, cut=True)),
        after(lambda stream: stream.send(FOX, cut=True)),
        after(lambda stream: stream.send(None)),
    )
    assert all(torch.equal(*each) for each in zip(cut, spoken, strict=True))
    if name == "infinity-rope":  # a cut has a meaning of its own there
        assert not torch.allclose(cut[0], plain[0], atol=1e-2)


def test_a_prompt_of_another_batch_changes_nothing():
    pipe = pipeline("self-forcing", chunk_frames=1, window_frames=3, sink_frames=1)
    stream = pipe.packforcing.stream(FOX, num_frames=9, generator=seeded(), **CALL)
    parts = [next(stream)]
    with pytest.raises(InvalidOptionError, match="for as many videos as the first, 1, got 2"):
        stream.send([FOX, DOG])
    parts += list(stream)
    assert torch.equal(torch.cat(parts, dim=2), generate(pipe, FOX, 3))


def test_embeddings_may_change_as_texts_do():
    pipe = pipeline("self-forcing", chunk_frames=1, window_frames=3, sink_frames=1)
    with torch.no_grad():
        fox, dog = (
            pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=16)[0]
            for text in (FOX, DOG)
        )
    spoken = generate(pipe, [(0, FOX), (0.5, DOG)], 6)
    assert torch.equal(generate(pipe, None, 6, prompt_embeds=[(0, fox), (0.5, dog)]), spoken)
    assert torch.equal(generate(pipe, [(0, fox), (0.5, dog)], 6), spoken)
    stream = pipe.packforcing.stream(prompt_embeds=fox, num_frames=21, generator=seeded(), **CALL)
    parts = [next(stream), next(stream), next(stream), stream.send(dog), *stream]
    assert torch.equal(torch.cat(parts, dim=2), spoken)
    with pytest.raises(InvalidOptionError, match=r"got a tensor \(16, 32\)"):
        generate(pipe, None, 6, prompt_embeds=[(0, fox[0])])


def test_a_prompt_behind_the_end_of_the_video_is_told(caplog):
    """Perhaps its frames were given for seconds."""
    pipe = pipeline("self-forcing", chunk_frames=3, window_frames=6)
    with caplog.at_level("WARNING", logger="kvpack"):
        late = generate(pipe, [(0, FOX), (0.5, DOG), (48, FOX)], frames=9)
    said = [record.getMessage() for record in caplog.records if "is not used" in record.getMessage()]
    assert said == ["the prompt for second 48 and later is not used, for the video ends before"]
    caplog.clear()
    assert torch.equal(generate(pipe, [(0, FOX), (0.5, DOG)], frames=9), late)
    with pipe.packforcing.stream([(0, FOX), (48, DOG)], **{**CALL, "generator": seeded()}) as endless:
        next(endless)
    assert not [record for record in caplog.records if "is not used" in record.getMessage()]


def test_seconds_are_those_of_fps():
    pipe = pipeline("self-forcing", chunk_frames=1, window_frames=3, sink_frames=1)
    pipe.packforcing.fps = 8
    half = generate(pipe, [(0, FOX), (2.5, DOG)], 8)
    pipe.packforcing.fps = 16
    assert torch.equal(half, generate(pipe, [(0, FOX), (1.25, DOG)], 8))
    with pytest.raises(InvalidOptionError, match="fps must be a number > 0, got 0"):
        pipe.packforcing.fps = 0


# Replays of stacks


def test_a_stack_computes_the_recent_window_anew_and_keeps_the_rest():
    pipe = pipeline("packforcing", topk=2, sink_frames=2, recent_frames=4, chunk_frames=2)
    stream = pipe.packforcing.stream(FOX, num_frames=None, generator=seeded(), **CALL)
    for _ in range(6):
        next(stream)
    session = pipe.packforcing.sessions["cond"]
    book, before = ledger(session), held(session)
    assert session.replays() == (2, 2)
    run = pipe._kvpack.run
    run.set_prompt(DOG)
    assert ledger(session) == book
    assert session.past.book.aim is None
    for (piece, old), (_, new) in zip(before, held(session), strict=True):
        same = all(torch.equal(a, b) for x, y in zip(old, new, strict=True) for a, b in zip(x, y, strict=True))
        assert same == (piece.first_frame < 8), piece
    stream.close()


def test_a_replay_under_the_same_prompt_is_the_commit_again():
    """Chunk by chunk in the context of before, where nothing that was attended then has been dropped since."""
    pipe = pipeline("full", chunk_frames=2)
    plain = generate(pipe, FOX, 8)
    again = generate(pipe, [(0, FOX), (1.0, FOX)], 8)
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("compressor", ["pool", "lr", "dual"])
def test_twins_are_replayed_with_their_chunk(compressor):
    pipe = pipeline("packforcing", topk=2, sink_frames=2, recent_frames=2, chunk_frames=2, compressor=compressor)
    call = {**CALL, "height": 64, "width": 64}
    stream = pipe.packforcing.stream(FOX, num_frames=None, generator=seeded(), **call)
    for _ in range(4):
        next(stream)
    session = pipe.packforcing.sessions["cond"]
    old = twins(session, -1)[-1]
    pipe._kvpack.run.set_prompt(DOG)
    new = twins(session, -1)[-1]
    assert (old is None) == (new is None) == (compressor == "pool")
    if old is not None:
        assert not torch.equal(old[0], new[0])
    next(stream)  # archives it
    stream.close()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("full", {}),
        ("packforcing", {"sink_frames": 3, "recent_frames": 3}),
        ("mixed-windows", {"windows": (6, 10), "sinks": (2,), "shares": ((0,), (1,))}),
    ],
)
def test_a_stack_computes_a_shorter_first_chunk_anew_with_the_rest(name, options):
    pipe = pipeline(name, chunk_frames=2, **options)
    pipe.packforcing.first_chunk_frames = 1
    with pipe.packforcing.stream(FOX, num_frames=None, generator=seeded(), **CALL) as stream:
        for prompt, plan in ((DOG, (1,)), (FOX, (1, 2)), (DOG, (1, 2, 2))):
            next(stream)
            session = pipe.packforcing.sessions["cond"]
            past = session.past
            assert session.replays() == plan
            pipe._kvpack.run.set_prompt(prompt)
            assert session.past.book == past.book
            kept = [each.states[-1] if name != "mixed-windows" else each.states[-1][0] for each in (past, session.past)]
            for old, new in zip(*(state.whole for state in kept), strict=True):
                assert not torch.equal(old.block.values, new.block.values)


@pytest.mark.parametrize(("first", "sink"), [(1, 1), (3, 3)])
def test_twins_of_a_shorter_first_chunk_are_replayed_with_it(first, sink):
    """Of a sink that is shorter than a chunk, so that a part of the first one is compressed."""
    pipe = pipeline("packforcing", chunk_frames=4, compressor="lr", selector="topk", sink_frames=sink, recent_frames=4)
    pipe.packforcing.first_chunk_frames = first
    with pipe.packforcing.stream(FOX, num_frames=None, generator=seeded(), **CALL) as stream:
        for _ in range(2):
            next(stream)
        assert pipe.packforcing.sessions["cond"].replays() == (first, 4)
        assert stream.send(DOG).isfinite().all()


def test_the_window_of_a_replay_is_an_option():
    stack = packforcing(chunk_frames=2, sink_frames=2, recent_frames=6)
    for most, plan in ((21, (2, 2, 2)), (4, (2, 2)), (3, (2,)), (0, ())):
        session = Session(replace(stack, replay_frames=most), TINY)
        run_session(session, 8)
        assert session.replays() == plan


def test_a_replay_that_fails_leaves_all_as_it_was():
    pipe = pipeline("self-forcing", chunk_frames=1, window_frames=4, sink_frames=1)
    stream = pipe.packforcing.stream(FOX, num_frames=29, generator=seeded(), **CALL)
    parts = [next(stream) for _ in range(5)]
    run = pipe._kvpack.run
    session, embeds = pipe.packforcing.sessions["cond"], run.denoiser.conditioning
    past, frames = session.past, session.frames

    def broken(module, args):
        if session.frames == frames - 1:  # the second of two chunks
            raise RuntimeError("out of memory")

    handle = pipe.transformer.blocks[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        stream.send(DOG)
    handle.remove()
    assert session.past is past
    assert run.denoiser.conditioning is embeds
    parts += list(stream)
    assert torch.equal(torch.cat(parts, dim=2), generate(pipe, FOX, 8))


# LongLive


@pytest.mark.parametrize("global_sink", [True, False])
def test_longlive_recomputes_its_window_at_once(global_sink):
    memory = LongLive(chunk_frames=2, window_frames=6, sink_frames=2, global_sink=global_sink)
    session = Session(memory, TINY)
    run_session(session, 5)
    old = state(session)
    assert session.replays() == (6,)
    session.rewind(6)
    session.commit((), torch.zeros(1, 16, 6, 8, 12))
    forward(session, 6)
    seen = attended_frames(session)
    hidden = context(session).hidden
    assert seen == (([0.0, 1.0], 4) if global_sink else ([], 4))
    assert hidden == (2 * FRAME if global_sink else 0)
    assert session.attended(0)[0].shape[1] == (2 * FRAME if global_sink else 0)
    session.finish_commit()
    after = state(session)
    assert session.frames == 10
    sink, recent = (part.coordinates[0, ::FRAME, 0].tolist() for part in (after.sink, after.recent))
    assert (sink, recent) == (([0, 1], [6, 7, 8, 9]) if global_sink else ([4, 5], [6, 7, 8, 9]))
    assert torch.equal(old.sink.keys, after.sink.keys) == global_sink
    session.denoise(0)
    forward(session)
    assert attended_frames(session) == ([*sink, 8, 9], 10)


def test_longlive_recomputes_a_short_history_with_its_sink():
    session = Session(LongLive(chunk_frames=2, window_frames=6, sink_frames=2), TINY)
    run_session(session, 3)  # six frames: nothing has left the window
    old = state(session)
    assert replay(session) == (6,)
    after = state(session)
    assert after.sink.coordinates[0, ::FRAME, 0].tolist() == [0, 1]
    assert not torch.equal(old.sink.keys, after.sink.keys)


def test_frames_of_longlives_replay_attend_each_other():
    """The first chunk's keys follow from later ones; chunk by chunk they could not."""

    def keys(change):
        pipe = pipeline("longlive", chunk_frames=1, window_frames=4, sink_frames=1)
        stream = pipe.packforcing.stream(FOX, num_frames=None, generator=seeded(), **CALL)
        for _ in range(3):
            next(stream)
        memory = pipe._kvpack.run.denoiser
        clean = memory._clean.latents
        clean[-1].add_(change)
        pipe._kvpack.run.set_prompt(DOG)
        stream.close()
        return state(memory.sessions["cond"], -1).sink.keys

    assert not torch.allclose(keys(0.0), keys(1.0), atol=1e-3)


# Infinity-RoPE


def test_infinity_rope_flushes_and_cuts():
    session = Session(InfinityRoPE(), TINY)
    run_session(session, 4)
    for event, places in (
        (None, ([0, 1, 2], 3)),
        ("prompt-changed", ([0, 1, 2], 3)),  # the sink and two frames are all that the window of six holds anyway
        ("scene-cut", ([0, 1, 2], 45)),
    ):
        if event:
            session.notify(event)
        session.denoise(0)
        forward(session)
        assert attended_frames(session) == places
        session.commit()
        forward(session)
        assert attended_frames(session) == places
        session.finish_commit()
    session.denoise(0)
    forward(session)
    assert attended_frames(session) == ([0, 1, 2], 3)


def test_tokens_are_those_of_a_chunks_own_steps_whichever_is_the_first():
    """As of the second of two experts, whose first step is none of a chunk's first."""
    session, told = Session(InfinityRoPE(window_frames=9), TINY), []
    run_session(session, 4)
    for event in ("scene-cut", "prompt-changed"):
        session.notify(event)
        session.denoise(2)
        forward(session)
        told.append(session.stats()["attended_tokens"])
        session.adopt(session.past)
    assert told == [6 * FRAME, 3 * FRAME]


def test_a_flush_leaves_the_last_frames():
    session = Session(InfinityRoPE(window_frames=9), TINY)
    run_session(session, 4)
    session.notify("prompt-changed")
    session.denoise(0)
    forward(session)
    assert attended_frames(session) == ([0, 1, 2], 3)
    kept = context(session).tokens[1].keys
    assert torch.equal(kept, state(session).recent.keys[:, -2 * FRAME :])
    with pytest.raises(InvalidOptionError, match="window_frames must be at least 6"):
        InfinityRoPE(window_frames=5)


# Krea


def test_krea_forwards_its_context_from_nothing_and_encodes_the_first_frame_anew(monkeypatch):
    pipe = pipeline("krea", chunk_frames=1, context_frames=2)
    commits, encoded = [], []
    real_commit, real_encode = Session.commit, wan_denoiser.encode
    monkeypatch.setattr(
        Session,
        "commit",
        lambda self, twins=(), latents=None: (
            commits.append((self.frames, latents)),
            real_commit(self, twins, latents),
        )[1],
    )
    monkeypatch.setattr(
        wan_denoiser, "encode", lambda vae, frames: (encoded.append(frames), real_encode(vae, frames))[1]
    )
    chunks = list(
        pipe.packforcing.stream(FOX, num_frames=13, generator=seeded(), **{**CALL, "height": 64, "width": 64})
    )
    assert [first for first, _ in commits] == [0, 0, 1, 1, 2, 2, 3]
    assert [each.shape[2] for each in encoded] == [1, 1]  # once the first frame of the video is gone
    assert torch.equal(commits[2][1], chunks[1].float())
    assert not torch.equal(commits[3][1], chunks[1].float())
    torch.testing.assert_close(commits[3][1], real_encode(pipe.vae, encoded[0]).to(commits[3][1]))
    # The pixel frame is the last that latent frame 1 stands for.
    decode = StreamingDecoder(pipe.vae, 64, 64)
    with torch.no_grad():
        pixels = [decode(each) for each in chunks]
    torch.testing.assert_close(encoded[0], pixels[1][:, :, -1:])


def test_krea_has_a_shorter_first_chunk_for_as_long_as_it_fits(monkeypatch):
    pipe, encoded = pipeline("krea", chunk_frames=2, context_frames=4), []
    pipe.packforcing.first_chunk_frames = 1
    real = wan_denoiser.encode
    monkeypatch.setattr(wan_denoiser, "encode", lambda vae, frames: (encoded.append(frames), real(vae, frames))[1])
    call = {**CALL, "height": 64, "width": 64}
    with pipe.packforcing.stream(FOX, num_frames=None, generator=seeded(), **call) as stream:
        for frames, times in (([0], 0), ([0, 1, 2], 0), ([1, 2, 3, 4], 1), ([3, 4, 5, 6], 2)):
            next(stream)
            held = state(pipe.packforcing.sessions["cond"])
            assert held.coordinates[0, :: len(held) // len(frames), 0].tolist() == frames
            assert len(encoded) == times


@pytest.mark.parametrize("name", ["magi", "token-trim"])
def test_a_shorter_first_chunk_is_replayed_with_the_rest(name):
    pipe = pipeline(name, chunk_frames=2)
    pipe.packforcing.first_chunk_frames = 1
    with pipe.packforcing.stream(FOX, num_frames=None, generator=seeded(), **CALL) as stream:
        for _ in range(3):
            next(stream)
        session = pipe.packforcing.sessions["cond"]
        assert session.replays() == (1, 2, 2)
        before, chunks = state(session, -1), session.past.book.chunks
        pipe._kvpack.run.set_prompt(DOG)
        after = state(session, -1)
    old, new = (each if name == "magi" else each.window for each in (before, after))
    assert session.past.book.chunks == chunks
    assert torch.equal(old.coordinates, new.coordinates)
    assert (old.values - new.values).abs().amax(dim=(0, 2, 3)).min() > 0  # of every token


def test_kreas_bias_is_on_the_past_while_denoising_only():
    session = Session(Krea(past_bias=-1.0), TINY)
    run_session(session, 2)
    session.denoise(0)
    forward(session)
    assert attended_frames(session) == ([0, 1, 2], 3)
    assert [part.bias for part in context(session).tokens] == [-1.0]
    session.adopt(session.past)
    session.commit()
    forward(session)
    assert [part.bias for part in context(session).tokens] == [0.0]
    with pytest.raises(InvalidOptionError, match="multiple of chunk_frames, 3, got 4"):
        Krea(context_frames=4)


# TokenTrim


def trimmed(**options):
    return TokenTrim(chunk_frames=1, window_frames=4, share=0.1, **options)


def latents(value=0.0, jump=(), rows=1):
    each = torch.full((rows, 16, 1, 8, 10), value)
    for row, place in jump:
        y, x = divmod(place, 5)
        each[row, :, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 10.0
    return each


def committed(session, clean):
    session.denoise(0)
    forward(session)
    session.commit((), clean)
    forward(session)
    session.finish_commit()


def test_token_trim_leaves_out_what_jumps():
    session = Session(trimmed(), TINY)
    for value in (0.0, 0.1, 0.3, 0.4):  # severities .4, .8, .4
        committed(session, latents(value))
    after = state(session)
    assert after.count == 3
    torch.testing.assert_close(after.mean, torch.tensor([1.6 / 3]))
    assert session.review(latents(0.5)) is None
    session.denoise(0)
    forward(session)
    whole = context(session).tokens[0]
    vetoed = session.review(latents(0.4, jump=[(0, 7), (0, 12)]))
    assert vetoed.tolist() == [True]
    session.denoise(0)
    forward(session)
    left = context(session).tokens[0]
    assert len(whole) - len(left) == 2 * 3
    gone = {tuple(place) for place in whole.coordinates[0].tolist()} - {tuple(p) for p in left.coordinates[0].tolist()}
    assert {(y, x) for _, y, x in gone} == {(1.0, 2.0), (2.0, 2.0)}
    assert state(session) is after
    session.settle()
    session.commit((), latents(0.4))
    forward(session)
    assert len(context(session).tokens[0]) == len(whole)


def test_a_vetoed_row_is_made_again_and_the_other_kept(monkeypatch):
    def veto(self, state, latents):
        rows = torch.tensor([True, False])[: latents.shape[0]] if state.count == 2 else torch.zeros(len(latents)).bool()
        return rows, state if not bool(rows.any()) else _unstable(state, latents)

    def _unstable(state, latents):
        return replace(state, unstable=torch.arange(2).expand(latents.shape[0], -1))

    monkeypatch.setattr(TokenTrim, "veto", veto)

    def run(prompt, seeds, retries):
        pipe = pipeline(TokenTrim(chunk_frames=1, window_frames=4, max_retries=retries))
        return generate(pipe, prompt, 6, generator=[seeded(seed) for seed in seeds])

    both, plain = run([FOX, DOG], (1, 2), 1), run([FOX, DOG], (1, 2), 0)
    assert torch.equal(both[:, :, :3], plain[:, :, :3])
    assert torch.equal(both[1], plain[1])
    assert not torch.allclose(both[0, :, 3], plain[0, :, 3], atol=1e-4)
    torch.testing.assert_close(both[:1], run([FOX], (1,), 1), rtol=0, atol=1e-5)
    endless = pipeline(TokenTrim(chunk_frames=1, window_frames=4)).packforcing.stream(
        [FOX, DOG], num_frames=None, generator=[seeded(1), seeded(2)], **CALL
    )
    with endless as stream:
        assert torch.equal(torch.cat([next(stream) for _ in range(5)], dim=2), both[:, :, :5])


def test_a_memory_that_replays_must_be_able_to_forget():
    with pytest.raises(NotImplementedError, match="has replay_frames, so it must have forget"):
        StateMemory.forget(trimmed(), None, 1)
    with pytest.raises(NotImplementedError, match="has max_retries, so it must have veto"):
        StateMemory.veto(trimmed(), None, latents())


@pytest.mark.parametrize("memory", [LongLive(), InfinityRoPE(), Krea(), TokenTrim()], ids=lambda each: each.name)
def test_memories_keep_the_contract(memory):
    check_memory(memory)


@pytest.mark.parametrize(
    ("stack", "plan", "anew"),
    [
        (self_forcing(), (3,), [15, 16, 17]),
        (infinite_forcing(), (3,), [16, 17]),  # of the last chunk the first frame is gone
        (packforcing(chunk_frames=2, sink_frames=2, recent_frames=3), (2, 2), [9, 10, 11]),  # of the last but one
    ],
    ids=["whole chunks", "a chunk without its first frame", "a chunk half compressed"],
)
def test_a_replay_reaches_every_recent_frame_and_no_other(stack, plan, anew):
    session = Session(stack, TINY)
    run_session(session, 6)
    book, before = ledger(session), held(session)
    assert replay(session) == plan
    assert ledger(session) == book
    changed = [
        frame
        for (_, old), (piece, new) in zip(before, held(session), strict=True)
        for frame in range(piece.first_frame, piece.stop)
        if not torch.equal(old[0][0], new[0][0])
    ]
    assert changed == anew
    run_session(session, 2)


def test_token_trim_does_not_count_a_replay():
    session = Session(trimmed(), TINY)
    for value in (0.0, 0.1, 0.3, 0.4):
        committed(session, latents(value))
    before = state(session)
    assert replay(session) == (1, 1, 1)
    after = state(session)
    assert (after.count, after.mean, after.squares) == (before.count, before.mean, before.squares)
    assert torch.equal(after.summary, before.summary)


def test_rows_that_any_branch_vetoes_are_made_anew():
    made = [torch.tensor([True, False, False]), None, torch.tensor([False, True, False])]
    sessions = {str(index): SimpleNamespace(review=lambda _, rows=rows: rows) for index, rows in enumerate(made)}
    vetoed = Denoiser.vetoed(SimpleNamespace(sessions=sessions), torch.zeros(3))
    assert vetoed.tolist() == [True, True, False]
