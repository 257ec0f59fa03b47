"""The measures: each falls for what it is about and for nothing else, and videos that must not win don't."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.baselines import floors, through_vae
from benchmarks.toyworld import evaluate, world
from benchmarks.toyworld.facts import brightness, facts_of
from kvpack.errors import InvalidOptionError, KVPackError
from kvpack.evaluation import METRICS, Facts, Observation, Observer, drift, measures, motion

SCENE = world.Scene("orange", "square", "night stripes")
FRAMES = 192
LATE = FRAMES // 2
FELL, HELD = 0.2, 0.08


@cache
def clip() -> world.Clip:
    return world.make_clip(SCENE, 5, FRAMES)


def observed(video: np.ndarray, facts: Facts | None = None) -> Observation:
    observer = Observer(facts or facts_of(SCENE))
    observer.add(video)
    return observer.finish()


def all_of(video: np.ndarray, facts: Facts | None = None) -> dict[str, float]:
    seen = observed(video, facts)
    return measures(seen, 0, seen.frames)


@cache
def truth() -> dict[str, float]:
    return all_of(clip().video)


def fallen(row: dict[str, float]) -> set[str]:
    """The measures that fell clearly; all others must have held, up to pixels."""
    down = {name for name in METRICS if not row[name] > truth()[name] - FELL}
    loose = {name: row[name] - truth()[name] for name in set(METRICS) - down if row[name] < truth()[name] - HELD}
    assert not loose
    return down


def drawn(scene: world.Scene, scale: float = 1.0, lamps: tuple[str, ...] | None = None) -> np.ndarray:
    """The clip's path drawn anew: with another scene, size or other lamps."""
    c = clip()
    lamps = lamps or c.lamps
    alpha = world.coverage(scene.shape, c.position, c.scale * scale)[..., None]
    walls = zip(world.WALLS, lamps, strict=True)
    backs = np.stack([world.room(scene.background, wall, lamp) for wall, lamp in walls])[c.lit]
    pixels = backs * (1 - alpha) + np.asarray(world.COLOURS[scene.colour], np.float32) * alpha
    return np.round(pixels * 255).astype(np.uint8)


def late(video: np.ndarray) -> np.ndarray:
    """The clip, going on as another video."""
    return np.concatenate([clip().video[:LATE], video[LATE:]])


@pytest.mark.parametrize("scene", world.HELD_OUT[::3], ids=lambda scene: scene.caption)
def test_the_truth_is_near_perfect(scene: world.Scene) -> None:
    c = world.make_clip(scene, 2, 160)
    seen = observed(c.video, facts_of(scene))
    found = measures(seen, 0, 160)
    assert list(found) == list(METRICS)
    assert found["subject_consistency"] > 0.93
    assert found["background_consistency"] > 0.98
    assert found["prompt_alignment"] == 1
    assert found["temporal_flickering"] > 0.99
    assert found["revisit_consistency"] > 0.99
    assert found["dynamic_degree"] == pytest.approx(np.hypot(*c.velocity[0]) / world.SIZE, rel=0.08)
    assert np.hypot(*(seen.centre * world.SIZE - c.position).T).max() < 0.8
    assert np.array_equal(seen.landmark_on.argmax(1), c.lit)
    assert all(abs(value) < 0.05 or name == "dynamic_degree" for name, value in drift(seen).items())


def test_another_colour_late_is_another_subject() -> None:
    named = Facts(**{**vars(facts_of(SCENE)), "colour": None})
    other = world.Scene("cyan", SCENE.shape, SCENE.background)
    assert fallen(all_of(late(drawn(other)), named)) == {"subject_consistency"}


def test_a_shrunk_subject_is_another_one() -> None:
    assert fallen(all_of(late(drawn(SCENE, 0.65)))) == {"subject_consistency"}


def test_another_form_late_is_another_subject() -> None:
    named = Facts(**{**vars(facts_of(SCENE)), "shape": None})
    other = world.Scene(SCENE.colour, "triangle", SCENE.background)
    assert fallen(all_of(late(drawn(other)), named)) == {"subject_consistency"}


def test_other_lamps_on_revisits_are_forgotten_ones() -> None:
    c = clip()
    assert set(c.lit[:LATE]) & set(c.lit[LATE:])
    others = tuple(reversed(c.lamps))
    assert fallen(all_of(late(drawn(SCENE, lamps=others)))) == {"revisit_consistency"}


def test_another_background_late_is_another_place() -> None:
    named = Facts(**{**vars(facts_of(SCENE)), "background": None})
    other = world.Scene(SCENE.colour, SCENE.shape, "plain slate")
    assert fallen(all_of(late(drawn(other)), named)) == {"background_consistency"}
    assert all_of(late(drawn(other)))["prompt_alignment"] == pytest.approx(1 - LATE / FRAMES / 3, abs=0.02)


def test_a_frozen_video_does_not_move_and_shows_nothing_again() -> None:
    row = all_of(floors(clip().video)["frozen"])
    assert row["dynamic_degree"] == 0
    assert np.isnan(row["revisit_consistency"])
    assert fallen(row) == {"dynamic_degree", "revisit_consistency"}


def test_shuffled_frames_do_not_move() -> None:
    row = all_of(floors(clip().video)["shuffled"])
    assert row["dynamic_degree"] < 0.05
    assert row["subject_consistency"] > 0.9


def test_flicker() -> None:
    sign = np.where(np.arange(FRAMES) % 2, 5, -5)[:, None, None, None]
    flickering = np.clip(clip().video.astype(int) + sign, 0, 255).astype(np.uint8)
    assert fallen(all_of(flickering)) == {"temporal_flickering"}


@pytest.mark.parametrize(
    "wrong",
    [
        world.Scene("blue", "square", "night stripes"),
        world.Scene("orange", "triangle", "night stripes"),
        world.Scene("orange", "square", "dusk rings"),
    ],
    ids=lambda scene: scene.caption,
)
def test_another_caption_is_not_what_is_shown(wrong: world.Scene) -> None:
    row = all_of(clip().video, facts_of(wrong))
    assert fallen(row) == {"prompt_alignment"}
    assert row["prompt_alignment"] == pytest.approx(2 / 3, abs=0.02)


def test_an_absent_subject_counts_nothing_and_its_look_on_return_counts() -> None:
    c = clip()
    gone = c.video.copy()
    empty = np.round(world.background(SCENE.background) * 255).astype(np.uint8)
    gone[40:80] = empty
    facts = Facts(fps=world.FPS, subject=brightness_inside)
    seen = observed(gone, facts)
    assert not seen.visible[40:80].any()
    assert measures(seen, 40, 80)["subject_consistency"] == 0
    assert measures(seen, 80, 120)["revisit_consistency"] > 0.95
    other = gone.copy()
    other[80:] = drawn(world.Scene("cyan", SCENE.shape, SCENE.background))[80:]
    assert measures(observed(other, facts), 80, 120)["revisit_consistency"] == 0


def brightness_inside(video: np.ndarray) -> np.ndarray:
    walls = np.logical_or.reduce([world.wall_mask(wall) for wall in world.WALLS])
    return brightness(video) * ~walls


def against_truth(row: dict[str, float]) -> float:
    """The mean ratio of measures to the truth's, each at most 1; an unknown measure counts as 0."""
    known = [name for name in METRICS if truth()[name] > 0]
    return float(np.mean([min(1.0, row[name] / truth()[name]) if np.isfinite(row[name]) else 0.0 for name in known]))


def test_no_floor_wins() -> None:
    won = {name: against_truth(all_of(video)) for name, video in floors(clip().video).items()}
    assert against_truth(truth()) == 1
    assert won["noise"] < 0.3
    assert won["frozen"] < 0.7
    assert won["shuffled"] < 0.85


def test_the_ceiling_goes_through_a_vae() -> None:
    from kvpack.testing import tiny_wan_pipeline

    vae = tiny_wan_pipeline().vae
    short = clip().video[:11, :32, :32]
    out = through_vae(vae, short)
    assert out.shape == short.shape
    assert out.dtype == np.uint8


@given(st.lists(st.integers(1, FRAMES - 1), max_size=6, unique=True))
@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("facts", [facts_of(SCENE), Facts(fps=world.FPS)], ids=["named", "nothing known"])
def test_a_stream_equals_the_whole(facts: Facts, cuts: list[int]) -> None:
    whole, observer = whole_of(facts), Observer(facts)
    for part in np.split(clip().video, sorted(cuts)):
        observer.add(part)
    assert_equal(observer.finish(), whole)


@cache
def whole_of(facts: Facts) -> Observation:
    return observed(clip().video, facts)


def assert_equal(one: Observation, other: Observation) -> None:
    for name, value in vars(one).items():
        assert np.array_equal(value, getattr(other, name), equal_nan=np.asarray(value).dtype.kind == "f"), name


def test_pixels_are_copied_and_not_kept() -> None:
    video, observer = clip().video.copy(), Observer(facts_of(SCENE))
    observer.add(video[:10])
    video[:10] = 0
    observer.add(video[10:])
    seen = observer.finish()
    assert_equal(seen, observed(clip().video))
    assert sum(np.asarray(value).nbytes for value in vars(seen).values()) < clip().video.nbytes / 4


def test_save_and_load(tmp_path: Path) -> None:
    seen = observed(clip().video[:100])
    assert np.isnan(list(drift(seen).values())).all()  # its first five seconds are its last ones too
    seen.save(tmp_path / "seen.npz")
    again = Observation.load(tmp_path / "seen.npz")
    assert_equal(seen, again)
    assert isinstance(again.fps, float)
    (tmp_path / "other.npz").write_bytes(b"no zip")
    np.savez(tmp_path / "lacking.npz", fps=16)
    for name in ("other.npz", "lacking.npz"):
        with pytest.raises(InvalidOptionError, match=r"must be an observation that save\(\) wrote"):
            Observation.load(tmp_path / name)


def test_frames_that_cannot_be_a_video() -> None:
    good = clip().video[:4]
    wrong = {
        "got float32; multiply by 255 and round": good.astype(np.float32) / 255,
        r"got shape \[4, 64, 64\]": good[..., 0],
        r"got shape \[0, 64, 64, 3\]": good[:0],
        r"8x8 pixels, got shape \[4, 4, 64, 3\]": good[:, :4],
    }
    for message, frames in wrong.items():
        with pytest.raises(InvalidOptionError, match=message):
            Observer(Facts()).add(frames)
    observer = Observer(Facts())
    observer.add(good)
    with pytest.raises(InvalidOptionError, match="one size, 64x64 so far, got 32x64"):
        observer.add(good[:, :32])
    with pytest.raises(
        InvalidOptionError, match="background 'night stripes' must be as large as the video, 32x64, got"
    ):
        Observer(facts_of(SCENE)).add(good[:, :32])
    with pytest.raises(InvalidOptionError, match="at least one frame"):
        Observer(Facts()).finish()


def test_facts_and_parts_that_cannot_be() -> None:
    with pytest.raises(InvalidOptionError, match="no colour named 'purple'"):
        Facts(colour="purple", palette=world.COLOURS)
    with pytest.raises(InvalidOptionError, match="fps must be a number > 0, got 0"):
        Facts(fps=0.0)
    with pytest.raises(InvalidOptionError, match="no landmark named 'door'"):
        Facts(glow={"door": np.zeros((64, 64), np.float32)})
    seen = observed(clip().video[:20])
    for begin, end in ((0, 0), (5, 3), (-1, 4), (0, 21)):
        with pytest.raises(InvalidOptionError, match="0 <= begin < end <= 20"):
            measures(seen, begin, end)


def test_what_cannot_be_said_is_nan() -> None:
    seen = observed(clip().video[:3], Facts(fps=world.FPS, subject=brightness))
    found = measures(seen, 0, 1)
    unknown = {name for name, value in found.items() if np.isnan(value)}
    assert unknown == {"dynamic_degree", "prompt_alignment", "temporal_flickering", "revisit_consistency"}


def test_two_bounces_of_the_fastest_object_are_followed() -> None:
    seconds = np.arange(160)[:, None] / world.FPS
    low, high = (np.asarray(edge) for edge in world.limits("circle", 1.15, world.LIT))
    path, _ = world.fold((20 + seconds * np.array([[44.0, 3.0]])).astype(np.float32), low, high)
    assert motion.coherent_speed(path / world.SIZE, world.FPS) == pytest.approx(44.1 / world.SIZE, rel=0.03)


def panned(step: int) -> np.ndarray:
    """A textured wall, along which the camera moves."""
    rng = np.random.default_rng(0)
    wall = rng.uniform(0, 255, (24, 200)).repeat(8, 0).repeat(8, 1)
    kernel = np.ones(9) / 9
    wall = np.apply_along_axis(np.convolve, 1, wall, kernel, "same")
    wall = np.apply_along_axis(np.convolve, 0, wall, kernel, "same").astype(np.uint8)
    return np.stack([wall[:96, step * t : step * t + 128, None].repeat(3, -1) for t in range(24)])


def test_without_a_subject_motion_is_that_of_the_picture() -> None:
    nowhere = Facts(fps=16.0)
    moving, still = observed(panned(3), nowhere), observed(panned(0), nowhere)
    assert len(still.flow) == 3
    assert not len(moving.flow) or motion_of(moving) > 0.1
    assert motion_of(still) < 0.01
    noise = np.random.default_rng(1).integers(0, 256, (24, 64, 64, 3), np.uint8)
    assert motion_of(observed(noise, nowhere)) < 0.05


def motion_of(seen: Observation) -> float:
    return measures(seen, 0, seen.frames)["dynamic_degree"]


def test_optical_flow_sees_a_shift() -> None:
    frames = panned(1)[:2, :, :, 0].astype(np.float32) / 255
    assert motion.flow_speed(frames[0], frames[1], 16.0) == pytest.approx(16 / 96, rel=0.5)
    assert motion.flow_speed(frames[0], frames[0], 16.0) < 1e-3


def test_optical_flow_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "skimage.registration", None)
    with pytest.raises(KVPackError, match=r"pip install 'kvpack\[evaluation\]'"):
        motion.flow_speed(np.zeros((64, 64), np.float32), np.zeros((64, 64), np.float32), 16.0)


def test_the_gate_of_training() -> None:
    row = evaluate.judge(clip().video, SCENE)
    assert row["visible"] == row["colour"] == row["shape"] == row["background"] == row["one wall lit"] == 1
    assert row[evaluate.ERROR] < 0.5
    assert row["lamp colour"] > 0.99
    lines = evaluate.table({"one": [row], "two": [{**row, "PSNR, dB": 40.0}]}).splitlines()
    assert lines[0] == "| | one | two |"
    assert lines[-1] == "| PSNR, dB |  | 40.000 |"
    json.dumps(row)
