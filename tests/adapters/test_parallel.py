"""Heads over several processes: the videos of one process, a part of its memory each, and errors in all of them."""

import itertools
import os
from dataclasses import replace

import pytest
import torch

import kvpack
from helpers import distance, quiet, random_branch, seeded
from kvpack.errors import InvalidOptionError, ParallelError, UnsupportedPipelineError
from kvpack.policies import HighResolutionCompressor, Int8Codec, ResidualCodec, packforcing
from kvpack.policies.dual import DualCompressor
from kvpack.policies.h2o import HeavyHitters
from kvpack.testing import tiny_wan_pipeline
from kvpack.testing.ranks import RanksFailed, enable_ulysses, run_ranks

CALL = {
    "prompt": [(0, "a red circle"), (1.5, "the blue square")],
    "height": 32,
    "width": 32,
    "num_frames": 53,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "output_type": "latent",
}
SIZES = {"chunk_frames": 2, "sink_frames": 2, "recent_frames": 2, "topk": 2, "archive_blocks": 3}


def stack(compressor="pool", selector="topk", **changed):
    return packforcing(**SIZES, compressor=compressor, selector=selector, **changed)


def learned(cls, **options):
    return stack(cls(random_branch(48), **options))


DEEP = {"chunk_frames": 2, "window_frames": 6, "sink_frames": 2, "recent_frames": 2, "budget_frames": 5}
MEMORIES = {
    "packforcing": lambda: stack("pool", "topk"),
    "keep-attended": lambda: stack("keep-attended", "softmax-mass"),  # given all heads, and a mean over them
    "keep-farthest": lambda: stack("keep-farthest", share_selection=True),
    "int8": lambda: replace(stack(), store=Int8Codec(group_tokens=4)),
    "residual": lambda: replace(stack(), store=ResidualCodec()),
    "merged": lambda: replace(stack("keep-farthest"), eviction="merged"),
    "merged at random": lambda: replace(stack("keep-random"), eviction="merged"),
    "least selected": lambda: replace(stack(), eviction="least-selected", share_selection=True),
    "lr": lambda: stack("lr"),
    "dual": lambda: learned(DualCompressor),
    "hr": lambda: learned(HighResolutionCompressor, project="direct"),
    "deep-forcing": lambda: ("deep-forcing", DEEP),
    "mixed-windows": lambda: (
        "mixed-windows",
        {"chunk_frames": 2, "windows": (4, 8), "sinks": (1, 2), "shares": ((1,), (0,))},
    ),
    "h2o": lambda: HeavyHitters(chunk_frames=2, budget_frames=6, recent_frames=2),
}


def pipeline(ranks=1, memory="packforcing"):
    """Parallelism may be enabled before the memory or after it."""
    pipe, made = quiet(tiny_wan_pipeline(num_attention_heads=4)), MEMORIES[memory]()
    name, options = made if isinstance(made, tuple) else (made, {})
    if memory == "h2o":
        kvpack.enable(pipe, name, **options)
    if ranks > 1:
        enable_ulysses(pipe.transformer, ranks)
    return pipe if memory == "h2o" else kvpack.enable(pipe, name, **options)


def generated(memory, ranks=1):
    """Latents, the choices of every chunk, and bytes."""
    pipe, chosen, held = pipeline(ranks, memory), [], []

    def look(progress):
        stats = pipe.packforcing.stats()
        chosen.append(repr(stats["selected"]) if stats.get("selected") else "")
        held.append(stats["resident_bytes"])

    latents = pipe(generator=seeded(), on_chunk=look, **CALL).frames
    return {"latents": latents, "chosen": chosen, "held": max(held), "sent": pipe.packforcing.stats().get("sent_bytes")}


@pytest.fixture(scope="module")
def alone():
    return {name: generated(name) for name in MEMORIES}


#: Memories of which a snapshot is read by one process, and by four.
SAVED = ("keep-attended", "int8", "residual", "merged", "lr", "deep-forcing", "mixed-windows")


@pytest.mark.parametrize(("ranks", "memories"), [(2, MEMORIES), (4, MEMORIES.keys() - set(SAVED))])
def test_the_videos_of_one_process(ranks, memories, alone):
    each = run_ranks(ranks, lambda _: {name: generated(name, ranks) for name in sorted(memories)})
    assert any(alone["packforcing"]["chosen"])
    for name in memories:
        wanted = alone[name]
        for got in each:
            assert distance(got[name]["latents"], wanted["latents"]) < 1e-5, name
            assert got[name]["chosen"] == wanted["chosen"], name
            assert torch.equal(got[name]["latents"], each[0][name]["latents"]), name
        assert max(got[name]["held"] for got in each) < 1.2 * wanted["held"] / ranks, name


def saved(ranks, memory, folder):
    stream = pipeline(ranks, memory).packforcing.stream(generator=seeded(), **CALL)
    for _ in itertools.islice(stream, 4):
        pass
    stream.save(folder, note="half")
    stream.close()


def resumed(ranks, memory, folder):
    with pipeline(ranks, memory).packforcing.resume(folder) as stream:
        assert stream.note == "half"
        return torch.cat(list(stream), dim=2)


@pytest.mark.parametrize("memory", SAVED)
def test_a_snapshot_is_read_by_any_number_of_processes(memory, alone, tmp_path):
    rest = alone[memory]["latents"][:, :, 8:]
    saved(1, memory, tmp_path / "one")
    run_ranks(2, lambda _: saved(2, memory, tmp_path / "two"))

    def work(_):
        return [resumed(4, memory, tmp_path / folder) for folder in ("one", "two")]

    for made in (*run_ranks(4, work)[3], resumed(1, memory, tmp_path / "two")):
        assert distance(made, rest) < 1e-5


def test_a_fork_and_a_rewind_go_on_in_all_processes(alone, tmp_path):
    def work(_):
        stream = pipeline(2, "int8").packforcing.stream(generator=seeded(), **CALL)
        parts = list(itertools.islice(stream, 4))
        stream.save(tmp_path)
        other = stream.fork()
        parts += list(stream)
        with other:
            again = [*parts[:4], *other]
        stream.rewind(len(parts) - 4)
        return [torch.cat(each, dim=2) for each in (parts, again, [*parts[:4], *stream])]

    wanted = alone["int8"]["latents"]
    assert all(distance(made, wanted) < 1e-5 for each in run_ranks(2, work) for made in each)


def test_a_snapshot_is_the_same_bytes_of_any_number_of_processes(tmp_path):
    """Chunks of two processes are those of one to the bit here, so that whole snapshots can be compared."""
    saved(1, "h2o", tmp_path / "one")
    run_ranks(2, lambda _: saved(2, "h2o", tmp_path / "two"))
    sizes = [sum(each.stat().st_size for each in (tmp_path / name).glob("*.safetensors")) for name in ("one", "two")]
    assert sizes[0] == sizes[1]


def test_a_rank_that_dies_ends_all():
    def work(rank):
        pipe = pipeline(2)
        for index, _ in enumerate(pipe.packforcing.stream(generator=seeded(), **CALL)):
            if rank == 1 and index == 1:
                os._exit(1)

    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, work, seconds=200)
    assert failed.value.errors[1] == ""
    assert "waits for another in vain" in failed.value.errors[0] or "Connection closed" in failed.value.errors[0]


def test_ranks_that_do_not_do_the_same():
    def other_seed(rank):
        with pytest.raises(ParallelError, match="made different latents"):
            pipeline(2)(generator=seeded(rank), **CALL)

    run_ranks(2, other_seed)


class WrongOnOneRank(HeavyHitters):
    rank = 0

    def remember(self, state, chunk):
        made = super().remember(state, chunk)
        if self.rank and chunk.index == 1:
            made.tokens.keys[:] = torch.nan
        return made


def test_a_policy_that_breaks_on_one_rank_raises_on_all():
    def work(rank):
        memory = WrongOnOneRank(chunk_frames=2, budget_frames=6, recent_frames=2)
        object.__setattr__(memory, "rank", rank)
        pipe = pipeline(2)
        kvpack.enable(pipe, memory)
        with pytest.raises(kvpack.KVPackError) as raised:
            pipe(generator=seeded(), **CALL)
        return str(raised.value)

    told = run_ranks(2, work)
    assert "another rank" in told[0] or "NaN" in told[0]
    assert "not finite" in told[1] or "NaN" in told[1]


def test_what_is_refused():
    def work(rank):
        pipe = pipeline(2)
        pipe.packforcing.first_chunk_frames = 1
        with pytest.raises(InvalidOptionError, match="cannot be split over 2 ranks"):
            pipe(generator=seeded(), **{**CALL, "height": 16, "width": 16})
        context = pipe.transformer._parallel_config.context_parallel_config
        context.ring_degree = 2
        with pytest.raises(UnsupportedPipelineError, match="ring attention"):
            kvpack.enable(pipe, "full")
        context.ring_degree, context.ulysses_degree = 1, 3
        with pytest.raises(UnsupportedPipelineError, match="4 heads"):
            kvpack.enable(pipe, "full")
        context.ulysses_degree = 2

        class Joint(HeavyHitters):
            by_head = False

        kvpack.enable(pipe, Joint(chunk_frames=2))
        with pytest.raises(UnsupportedPipelineError, match="by_head"):
            pipe(generator=seeded(), **CALL)

    run_ranks(2, work)
