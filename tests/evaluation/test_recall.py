"""Recall: it falls for what only compressed history can know and for nothing else, from the truth down to chance."""

from __future__ import annotations

from functools import cache
from itertools import permutations

import numpy as np
import pytest

from benchmarks.toyworld import world
from benchmarks.toyworld.facts import facts_of
from kvpack.errors import InvalidOptionError
from kvpack.evaluation import RECALL, Observation, Observer, WholeFrames, measures, recall
from kvpack.evaluation.measures import Look, looks

SCENE = world.Scene("orange", "square", "night stripes")
FRAMES = 480
SEED = 3


@cache
def clip() -> world.Clip:
    return world.make_clip(SCENE, SEED, FRAMES)


def observed(video: np.ndarray) -> Observation:
    observer = Observer(facts_of(SCENE))
    observer.add(video)
    return observer.finish()


@cache
def truth() -> Observation:
    return observed(clip().video)


def events() -> dict[str, list[Look]]:
    """Returns of the true clip by their source, told from its own facts: which wall is lit in which frame."""
    lit, found = clip().lit, {name: [] for name in RECALL}
    for wall in range(len(world.WALLS)):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], lit == wall, [False]]).astype(int))).reshape(-1, 2)
        for index, (begin, end) in enumerate(edges.tolist()):
            if index:
                on = np.flatnonzero(lit[:begin] == wall)
                recent, sink = bool((on >= begin - 32).any()), bool((on < 29).any())
                name = "returns_from_recent" if recent else "returns_from_sink" if sink else "recall"
                found[name].append(Look(begin, end, np.zeros(3)))
    return found


def relit(times: list[Look], lamps: tuple[str, ...]) -> np.ndarray:
    """The clip with other lamps at some times."""
    c = clip()
    video = c.video.copy()
    for time in times:
        alpha = world.coverage(SCENE.shape, c.position[time.begin : time.end], c.scale)[..., None]
        wall = int(c.lit[time.begin])
        back = world.room(SCENE.background, world.WALLS[wall], lamps[wall])
        pixels = back * (1 - alpha) + np.asarray(world.COLOURS[SCENE.colour], np.float32) * alpha
        video[time.begin : time.end] = np.round(pixels * 255).astype(np.uint8)
    return video


def mean(scores: tuple[float, ...]) -> float:
    return float(np.mean(scores))


def test_every_return_has_one_source_and_that_is_the_world_s() -> None:
    assert {name: len(found) for name, found in events().items()} == {
        name: len(found) for name, found in recall(truth(), 0, FRAMES).items()
    }
    assert all(len(found) >= 2 for found in events().values())


def test_the_truth_is_the_ceiling() -> None:
    assert all(mean(scores) > 0.99 for scores in recall(truth(), 0, FRAMES).values())


@pytest.mark.parametrize("corrupted", RECALL)
def test_each_falls_for_its_own_returns_alone(corrupted: str) -> None:
    lamps = tuple(reversed(clip().lamps))
    found = recall(observed(relit(events()[corrupted], lamps)), 0, FRAMES)
    for name, scores in found.items():
        assert mean(scores) < 0.6 if name == corrupted else mean(scores) > 0.99
    assert measures(observed(relit(events()[corrupted], lamps)), 0, FRAMES)["subject_consistency"] > 0.9


def test_a_guess_is_the_floor() -> None:
    """A lamp's colour drawn anew for each return scores what two colours of the palette have in common on average."""
    colours = {name: np.array(world.COLOURS[name]) for name in world.LAMPS}
    alike = [Look(0, 1, a).likeness(Look(0, 1, b)) for a in colours.values() for b in colours.values()]
    chance, draw, scores = float(np.mean(alike)), np.random.default_rng(0), []
    for _ in range(8):
        guessed = [(time, tuple(draw.choice(world.LAMPS, len(world.WALLS)))) for time in events()["recall"]]
        video = clip().video.copy()
        for time, lamps in guessed:
            video[time.begin : time.end] = relit([time], lamps)[time.begin : time.end]
        scores += recall(observed(video), 0, FRAMES)["recall"]
    assert 0.15 < chance < 0.3
    assert mean(tuple(scores)) == pytest.approx(chance, abs=0.1)
    wrong = [Look(0, 1, a).likeness(Look(0, 1, b)) for a, b in permutations(colours.values(), 2)]
    assert max(wrong) < 0.4


def test_parts_of_a_video_make_the_whole() -> None:
    whole, half = recall(truth(), 0, FRAMES), FRAMES // 2
    first, second = recall(truth(), 0, half), recall(truth(), half, FRAMES)
    for name in RECALL:
        assert sorted(first[name] + second[name]) == sorted(whole[name])


def test_what_is_kept_whole_is_an_option() -> None:
    everything = recall(truth(), 0, FRAMES, WholeFrames(first=0, last=0))
    assert everything["returns_from_sink"] == everything["returns_from_recent"] == ()
    assert len(everything["recall"]) == sum(len(times) - 1 for _, times in looks(truth()))
    nothing = recall(truth(), 0, FRAMES, WholeFrames(first=FRAMES, last=0))
    assert nothing["recall"] == ()
    with pytest.raises(InvalidOptionError, match="last must be >= 0, got -1"):
        WholeFrames(last=-1)
