"""A budget is kept, by the least change that does it, or refused with the least that would do."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch

import kvpack
from kvpack.adapters.wan import WanAdapter
from kvpack.errors import BudgetError, InvalidOptionError
from kvpack.planning import budget, presets, resident
from kvpack.planning.budget import STEPS, Budget
from kvpack.planning.planner import video_frames
from kvpack.plugins.registry import registry
from kvpack.plugins.resolve import NamedStack
from kvpack.testing import TINY, tiny_wan_pipeline

GIGABYTES = (0.5, 1, 2, 4, 8, 16)
THREE = ("packforcing", "self-forcing", "deep-forcing")
BOUNDED = [name for name in registry().names("stack") if name not in ("full", "packforcing-paper")]
CALL = {"height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 8, "output_type": "latent"}


def named(name: str, **options: Any) -> NamedStack:
    return NamedStack(name, options, {}, frozenset(options))


def wan(name: str = "wan2.1-t2v-1.3b") -> kvpack.Geometry:
    model = presets.preset(name)
    return presets.adapter_for(model).geometry(model.configs, 480, 832, torch.bfloat16)


def tiny(pipe: Any) -> kvpack.Geometry:
    configs = {"transformer": pipe.transformer.config, "vae": pipe.vae.config}
    return WanAdapter().geometry(configs, 64, 64, torch.float32)


@pytest.fixture
def pipe() -> Any:
    pipe = tiny_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def rehearsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearse each memory once: what a layer of tiny heads holds is the same under all models of a dtype."""
    run = resident._run

    @cache
    def trail(*given: Any) -> tuple[Any, list[Any]]:
        return run(*given), []

    def once(geometry: Any, memory: Any, batch: int, channels: int, first: Any = None, heads: int = 1, dim: int = 6):
        grid, dtype = geometry.grid, geometry.dtype
        shape = kvpack.Geometry(1, heads, dim, grid, (dim // 3,) * 3, dtype=dtype)
        going, made = trail(shape, memory, batch, channels, first, heads, dim)
        index = 0
        while True:
            while len(made) <= index:
                made.append(next(going))
            yield made[index]
            index += 1

    monkeypatch.setattr(resident, "_run", once)
    monkeypatch.setattr(budget, "most_resident", cache(resident.most_resident))


@pytest.mark.parametrize("name", THREE)
def test_every_preset_in_every_budget(name: str, rehearsed_once: None) -> None:
    """Kept, with the bytes of the chosen memory, or refused with the least that would do, and does."""
    stack, outcomes, seen = named(name), set(), set()
    asked = stack.made()
    for preset in presets.PRESETS.values():
        geometry, adapter = wan(preset.name), presets.adapter_for(preset)
        _, frames = video_frames(120, preset.settings.fps, adapter.temporal_scale(preset.configs))
        chunks = -(-frames // asked.chunk_frames)
        if (geometry, chunks) in seen:  # another name of the same sizes
            continue
        seen.add((geometry, chunks))
        for gigabytes in GIGABYTES:
            for branches, batch in ((1, 1), (2, 2)):
                size = {"batch": batch, "branches": branches}
                try:
                    choice = Budget(gigabytes, stack).choice(asked, geometry, chunks, **size)
                    assert choice.held_bytes <= gigabytes * 1e9
                    outcomes.add("changed" if choice.changes else "as it was")
                except BudgetError as error:
                    least = str(error).split("the least that would do is budget_gb=")[1].split(" ")[0]
                    choice = Budget(float(least), stack).choice(asked, geometry, chunks, **size)
                    assert gigabytes * 1e9 < choice.held_bytes <= float(least) * 1e9 <= 1.01 * choice.held_bytes
                    outcomes.add("refused")
                known = replace(geometry, frames=chunks * asked.chunk_frames)
                most = budget.most_resident(known, choice.memory, chunks, batch, 16, None)
                assert most is not None
                assert choice.held_bytes == most.bytes(geometry.layers) * branches
                assert len(choice.lines) >= bool(choice.changes)
    assert outcomes == {"refused", "changed", "as it was"}


#: Of these no option that the budget knows is left to change.
FIXED = ("fademem", "infinite-forcing", "infinity-rope", "krea", "longlive-rag", "magi", "mixed-windows")


@pytest.mark.parametrize("name", BOUNDED)
def test_nothing_is_changed_that_need_not_be(name: str, pipe: Any, rehearsed_once: None) -> None:
    """Without any one of the changes, windows changing together, the budget is exceeded."""
    geometry, stack = tiny(pipe), named(name)
    asked = stack.made()
    whole = Budget(1, stack).choice(asked, geometry, 20)
    assert whole.changes == {}
    assert whole.memory is asked
    changed = 0
    for share in (0.9, 0.6):
        share_of_it = Budget(share * whole.held_bytes / 1e9, stack)
        try:
            choice = share_of_it.choice(asked, geometry, 20)
        except BudgetError:
            continue
        changed += 1
        assert choice == share_of_it.choice(asked, geometry, 20)
        for together in {step.options for step in STEPS if set(step.options) & set(choice.changes)}:
            others = {option: value for option, value in choice.changes.items() if option not in together}
            try:
                most = resident.most_resident(geometry, stack.made(**others), 20, 1)
            except InvalidOptionError:
                continue
            assert most is not None
            assert most.bytes(geometry.layers) > choice.budget_bytes, (share, together)
    assert changed or name in FIXED


def test_what_loses_least_comes_first_and_each_line_says_its_bytes() -> None:
    stack = named("packforcing")
    asked = stack.made()

    def lines(gigabytes: float, stack: NamedStack = stack) -> list[str]:
        return str(Budget(gigabytes, stack).choice(asked, wan(), 120)).splitlines()

    host = "tier device -> host: 9.177 GB -> 5.252 GB; the same bits; what is chosen is copied once a chunk and layer"
    assert lines(16) == ["packforcing holds at most 9.177 GB of 16 GB"]
    assert lines(6) == [host, "packforcing holds at most 5.252 GB of 6 GB"]
    assert lines(4) == [
        host,
        "topk 16 -> 12: 5.252 GB -> 5.116 GB; fewer compressed blocks are attended",
        "sink_frames 8 -> 4: 5.116 GB -> 3.947 GB; windows are shorter",
        "packforcing holds at most 3.947 GB of 4 GB",
    ]
    assert lines(8, named("packforcing", tier="device"))[0] == (
        "store dense -> int8: 9.177 GB -> 7.047 GB; archived blocks are rounded to 8 bits"
    )
    order = list(dict.fromkeys(option for step in STEPS for option in step.options))
    assert order[:6] == ["tier", "store", "topk", "keep_tokens", "archive_blocks", "window_frames"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("packforcing", {"tier": "device", "store": "dense"}),
        ("packforcing", {"topk": 12, "keep_tokens": 300}),
        ("packforcing", {"sink_frames": 8, "archive_blocks": 100}),
        ("packforcing", {"selector": "recency", "compressor": "pool", "tier": "device"}),
        ("self-forcing", {"sink_frames": 2}),
        ("sana-wm", {"window_frames": 9}),
    ],
)
def test_what_the_user_gave_is_kept(name: str, options: dict[str, Any]) -> None:
    stack = named(name, **options)
    asked, met, refused = stack.made(), 0, ""
    for gigabytes in (0.5, 2.5, 5):
        try:
            choice = Budget(gigabytes, stack).choice(asked, wan(), 100)
        except BudgetError as error:
            refused = str(error)
            continue
        met += 1
        assert not set(choice.changes) & set(options)
        assert choice.memory == stack.made(**choice.changes)
    assert met
    assert f"kept as they were given: {', '.join(sorted(options))}" in refused


def test_a_memory_that_is_given_whole_is_kept_or_refused() -> None:
    memory = registry().stack("packforcing", {})
    assert Budget(10).choice(memory, wan(), 120).memory is memory
    with pytest.raises(BudgetError, match=r"budget_gb=9.18 \(1 video, 1 guidance branch, .*all options of a memory"):
        Budget(9).choice(memory, wan(), 120)


def test_a_video_without_end_is_bounded_or_refused() -> None:
    stack = named("packforcing")
    assert Budget(9.6, stack).choice(stack.made(), wan(), None).held_bytes == 9_548_888_064
    for name in ("full", "packforcing-paper"):
        with pytest.raises(BudgetError, match=f"{name} grows without end, which no budget holds; give num_frames"):
            Budget(1000, named(name)).choice(named(name).made(), wan(), None)


@pytest.mark.parametrize("given", [{"chunks": 0}, {"batch": 0}, {"batch": -1}, {"batch": 1.5}, {"branches": 0}])
def test_nothing_holds_nothing(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(InvalidOptionError, match=f"{name} must be "):
        Budget(4).choice(registry().stack("packforcing", {}), wan(), **{"chunks": 20, **given})


@pytest.mark.parametrize("given", [0, -1, float("nan"), float("inf"), "4", True, None])
def test_only_a_number_is_a_budget(given: Any, pipe: Any) -> None:
    with pytest.raises(InvalidOptionError, match="budget_gb must be a number of gigabytes > 0"):
        Budget(given)
    if given is not None:
        with pytest.raises(InvalidOptionError, match="budget_gb must be"):
            pipe.enable_packforcing(budget_gb=given)


@pytest.mark.parametrize("name", [*BOUNDED, "packforcing-paper"])
def test_the_most_is_the_largest_of_all_chunks(name: str, pipe: Any) -> None:
    """The search ends where what is held repeats; no chunk that it leaves out is larger."""
    geometry, memory, chunks = tiny(pipe), registry().stack(name, {}), 40
    if isinstance(memory, kvpack.Stack):
        each = [counted.held for counted in islice(resident._counted(geometry, memory, 1), chunks)]
    else:
        each = resident._rehearsed(geometry, memory, chunks, 1, 16)
    most = resident.most_resident(geometry, memory, chunks, 1)
    assert most is not None
    assert len(each) == chunks
    assert most.bytes(geometry.layers) == max(one.bytes(geometry.layers) for one in each)
    assert resident.resident(geometry, memory, 5, 1) == each[4]


STACKS = [name for name in BOUNDED if isinstance(registry().stack(name, {}), kvpack.Stack)]


@pytest.mark.parametrize("name", [*STACKS, "deep-forcing", "merged", "full"])
def test_a_long_video_holds_what_repeats(name: str) -> None:
    """As much is held behind the fewest chunks as behind all, which nobody then counts."""
    options = {"eviction": "merged", "archive_blocks": 8} if name == "merged" else {}
    memory, chunks = registry().stack("packforcing" if name == "merged" else name, options), 411
    each: list[Any]
    if isinstance(memory, kvpack.Stack):
        each = list(islice(resident._counted(TINY, memory, 1), chunks))
    else:
        each = list(islice(resident._run(TINY, memory, 1, 16), chunks))
    few = resident.as_many(TINY, memory, chunks, 1)
    assert each[few - 1] == each[-1]
    assert (few == chunks) == (name == "full")
    assert resident.as_many(TINY, memory, 40, 1) == 40


def held(pipe: Any, prompt: Any = "a red circle", chunks: int = 12, **call: Any) -> int:
    """Generate, and return the most that was held behind any chunk."""
    frames = 4 * pipe.packforcing.stack.chunk_frames * chunks - 3
    with pipe.packforcing.stream(prompt, num_frames=frames, **{**CALL, "guidance_scale": 1.0, **call}) as stream:
        return max(pipe.packforcing.stats()["resident_bytes"] for _ in stream)


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("share", [2.0, 0.8, 0.6])
def test_measured_bytes_are_the_planned_bytes_in_every_tier(pipe: Any, tier: str, share: float) -> None:
    options = {"tier": tier, "topk": None, "keep_tokens": 16}
    stack = named("packforcing", **options)
    whole = Budget(1, stack).choice(stack.made(), tiny(pipe), 12, branches=2).held_bytes
    pipe.enable_packforcing(budget_gb=share * whole / 1e9, **options)
    measured = held(pipe, guidance_scale=2.0)
    choice = pipe.packforcing.choice
    assert measured == choice.held_bytes <= choice.budget_bytes
    assert bool(choice.changes) == (share < 1)
    assert (choice.memory.tier, choice.memory) == (tier, pipe.packforcing.stack)


@pytest.mark.parametrize("name", THREE)
def test_measured_bytes_are_the_planned_bytes_of_three_stacks(pipe: Any, name: str) -> None:
    pipe.enable_packforcing(name)
    whole = held(pipe, ["a red circle", "a blue square"], 8)
    for share in (1.0, 0.7):
        pipe.enable_packforcing(name, budget_gb=share * whole / 1e9)
        assert held(pipe, ["a red circle", "a blue square"], 8) == pipe.packforcing.choice.held_bytes <= share * whole
        assert bool(pipe.packforcing.choice.changes) == (share < 1)


def test_shorter_first_chunks_and_new_prompts_stay_within_the_plan(pipe: Any) -> None:
    schedule = [(0, "a red circle"), (2, "a blue square"), (5, "a green triangle", "cut")]
    for name, options in (("packforcing", {"topk": 2}), ("self-forcing", {}), ("longlive", {})):
        pipe.enable_packforcing(name, budget_gb=0.001, **options)
        pipe.packforcing.first_chunk_frames = 1
        assert held(pipe, schedule) <= pipe.packforcing.choice.held_bytes


def test_each_call_is_planned_for_itself(pipe: Any) -> None:
    """More videos, guidance or pixels: the memory is chosen again, or the call is refused before anything is made."""
    pipe.enable_packforcing("self-forcing", budget_gb=60e-6)
    held(pipe, chunks=4)
    assert pipe.packforcing.choice.changes == {}
    pipe.enable_packforcing("self-forcing", budget_gb=80e-6)
    assert held(pipe, chunks=4, guidance_scale=2.0) <= 80_000
    assert pipe.packforcing.choice.changes == {"window_frames": 6}

    def forward(*_: Any, **__: Any) -> None:
        raise AssertionError("a forward")

    pipe.transformer.forward = forward
    words = r"budget_gb=8e-05 is too little for self-forcing: .* is budget_gb=0.000148 \(2 videos, 2 guidance branches"
    with pytest.raises(BudgetError, match=words):
        held(pipe, ["a red circle", "a blue square"], guidance_scale=2.0)
    with pytest.raises(BudgetError, match="8x8 tokens a frame"):
        held(pipe, height=128, width=128)


def test_a_budget_ends_with_the_next_enabling_and_goes_with_copies(pipe: Any) -> None:
    pipe.enable_packforcing("self-forcing", budget_gb=40e-6)
    assert pipe.packforcing.choice is None
    other = copy.copy(pipe)
    assert held(other, chunks=4) <= 40_000
    pipe.enable_packforcing("self-forcing")
    assert held(pipe, chunks=4) > 40_000
    assert pipe.packforcing.choice is None


def test_forks_and_resumed_streams_go_on_with_what_was_chosen(tmp_path: Any) -> None:
    def enabled() -> Any:
        pipe = tiny_wan_pipeline()
        pipe.set_progress_bar_config(disable=True)
        return pipe.enable_packforcing(budget_gb=0.00012, tier="device")

    pipe = enabled()
    call = {**CALL, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(1)}
    stream = pipe.packforcing.stream("a red circle", num_frames=4 * 40 - 3, **call)
    for _ in range(6):
        next(stream)
    stream.save(tmp_path / "saved")
    forked, resumed = stream.fork(), enabled().packforcing.resume(tmp_path / "saved")
    assert pipe.packforcing.choice.changes
    going, other, again = (torch.cat(list(each), dim=2) for each in (stream, forked, resumed))
    assert torch.equal(going, other)
    assert torch.equal(going, again)
    smaller = tiny_wan_pipeline().enable_packforcing(budget_gb=0.00009, tier="device")
    with pytest.raises(kvpack.KVPackError, match="enable the pipeline as it was then"):
        smaller.packforcing.resume(tmp_path / "saved")


def test_a_replay_of_rows_that_are_gathered_apart_stays_within_its_budget(pipe: Any) -> None:
    """Chunks that lay in an arena come back as tensors of their own, beside it."""
    options = {"sink_frames": 6, "topk": 1, "compressor": "geometric", "selector": "topk", "chunk_frames": 2}
    pipe.enable_packforcing("packforcing", budget_gb=241_920 / 1e9, tier="device", store="dense", **options)
    size = {"height": 64, "width": 64, "num_frames": 61, "num_videos_per_prompt": 2}
    call = {"num_inference_steps": 1, "max_sequence_length": 8, "output_type": "latent", "guidance_scale": 1.0}
    with pipe.packforcing.stream([(0, "a"), (3.5, "b")], **size, **call) as chunks:
        most = max(pipe.packforcing.stats()["resident_bytes"] for _ in chunks)
    assert most <= pipe.packforcing.choice.budget_bytes
