"""The toy world: its renderer tells the truth, its measures notice what is wrong, its chain runs end to end."""

from __future__ import annotations

import runpy
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from diffusers import WanPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.toyworld import __main__ as recipe
from benchmarks.toyworld import chunked, export, parallel, sampler, text, train_transformer, vae_full, world
from benchmarks.toyworld.optim import orthogonalise

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "kvpack" / "data" / "toyworld"
SCENE = world.Scene("red", "circle", "dusk rings")


@pytest.mark.parametrize("scene", world.HELD_OUT, ids=lambda s: s.caption)
def test_ground_truth_matches_the_pixels(scene: world.Scene) -> None:
    clip = world.make_clip(scene, 3)
    assert np.mean((clip.video.max(-1) > world.BRIGHT * 255) != clip.bright) < 3e-3
    for t in range(0, world.FRAMES, 8):
        y, x = np.nonzero(clip.mask[t])
        if scene.shape != "triangle":  # its centre is not the middle of its box
            assert abs((x.min() + x.max()) / 2 - clip.position[t, 0]) <= 0.5
            assert abs((y.min() + y.max()) / 2 - clip.position[t, 1]) <= 0.5


@pytest.mark.parametrize("rules", world.RULES.values(), ids=world.RULES)
def test_motion_is_straight_at_one_speed(rules: world.Rules) -> None:
    clip = world.make_clip(SCENE, 7, rules=rules)
    low, high = world.limits(SCENE.shape, clip.scale, rules)
    steps = np.diff(clip.position, axis=0) * world.FPS
    straight = (np.sign(clip.velocity[1:]) == np.sign(clip.velocity[:-1])).all(1)
    speed = np.hypot(*clip.velocity.T)
    assert np.allclose(steps[straight], clip.velocity[:-1][straight], atol=1e-2)
    assert np.allclose(speed, speed[0], atol=1e-3)
    assert rules.speed[0] <= speed[0] <= rules.speed[1] + 1e-3
    assert (clip.position >= low - 1e-3).all()
    assert (clip.position <= high + 1e-3).all()


def test_the_plain_world_has_no_lamps_and_one_size() -> None:
    clip = world.make_clip(SCENE, 7, rules=world.PLAIN)
    assert clip.lamps == ()
    assert clip.scale == 1.0
    assert np.array_equal(clip.bright, clip.mask)
    assert (clip.position >= 12).all()
    assert (clip.position <= 52).all()
    empty = ~clip.mask.any(0)
    empty[1:-1, 1:-1] &= ~(clip.mask.any(0)[:-2, 1:-1] | clip.mask.any(0)[2:, 1:-1])
    assert np.abs(clip.video[:, empty] / 255 - world.background(SCENE.background)[empty]).mean() < 0.01


@given(seed=st.integers(0, 10**6), scene=st.sampled_from(world.SCENES))
@settings(max_examples=30, deadline=None)
def test_the_wall_that_was_touched_last_is_lit_in_its_own_colour(seed: int, scene: world.Scene) -> None:
    clip = world.make_clip(scene, seed, 64)
    assert len(set(clip.lamps)) == len(world.WALLS)
    turned = np.sign(clip.velocity[1:]) != np.sign(clip.velocity[:-1])
    for t in np.flatnonzero(turned.any(1)) + 1:
        # a wall on the side that the object now leaves; both axes may have turned between two frames
        sides = {2 * axis + int(clip.velocity[t, axis] < 0) for axis in np.flatnonzero(turned[t - 1])}
        assert clip.lit[t] in sides
    assert set(np.flatnonzero(np.diff(clip.lit)) + 1) <= set(np.flatnonzero(turned.any(1)) + 1)
    for t in range(0, 64, 9):
        wall = world.WALLS[clip.lit[t]]
        seen = clip.video[t][world.wall_mask(wall) & ~clip.mask[t]] / 255
        assert np.abs(seen - world.COLOURS[clip.lamps[clip.lit[t]]]).max() < 0.01


@given(seed=st.integers(0, 10**6), scene=st.sampled_from(world.SCENES))
@settings(max_examples=20, deadline=None)
def test_an_object_never_covers_a_wall(seed: int, scene: world.Scene) -> None:
    clip = world.make_clip(scene, seed, 64)
    walls = np.logical_or.reduce([world.wall_mask(wall) for wall in world.WALLS])
    assert not (clip.mask & walls).any()


def test_clips_are_seeded_and_extend() -> None:
    clip, longer = world.make_clip(SCENE, 7), world.make_clip(SCENE, 7, 2 * world.FRAMES)
    assert np.array_equal(longer.video[: world.FRAMES], clip.video)
    assert longer.lamps == clip.lamps
    assert not np.array_equal(world.make_clip(SCENE, 8).video, clip.video)


def test_the_world_needs_memory() -> None:
    """Walls come on again that neither the last second nor the first two have shown."""
    forgotten = returns = 0
    for seed in range(20):
        lit = world.make_clip(SCENE, seed, 20 * world.FPS).lit
        for t in np.flatnonzero(np.diff(lit)) + 1:
            begin = t // world.FPS * world.FPS  # of the chunk
            seen = np.flatnonzero(lit[:begin] == lit[t])
            returns += len(seen) > 0
            forgotten += len(seen) > 0 and seen.max() < begin - world.FPS and seen.min() >= 2 * world.FPS
    assert forgotten > 0.1 * returns


def test_held_out_scenes_are_disjoint_and_fair() -> None:
    assert not set(world.TRAIN) & set(world.HELD_OUT)
    assert set(world.TRAIN) | set(world.HELD_OUT) == set(world.SCENES)
    assert len({scene.caption for scene in world.SCENES}) == 96
    assert world.first_scenes(5) == world.HELD_OUT[:5]
    assert world.first_scenes(20)[:16] == world.HELD_OUT
    assert set(world.first_scenes(96)) == set(world.SCENES)
    assert len(set(world.HELD_OUT)) == 16
    assert set(world.scenes_of(world.LIT)) == set(world.TRAIN)
    assert {scene.colour for scene in world.scenes_of(world.PLAIN)} == set(world.LAMPS)
    for part in ("colour", "shape", "background"):
        assert {getattr(s, part) for s in world.TRAIN} == {getattr(s, part) for s in world.SCENES}
    words = [set(" ".join(names).split()) for names in (world.COLOURS, world.SHAPES, world.BACKGROUNDS)]
    assert sum(map(len, words)) == len(set.union(*words))


def test_objects_are_bright_and_rooms_dark() -> None:
    assert min(max(colour) for colour in world.COLOURS.values()) > world.BRIGHT + 0.25
    for name, wall, lamp in product(world.BACKGROUNDS, world.WALLS, world.LAMPS):
        lit = world.wall_mask(wall)
        assert world.room(name, wall, lamp)[~lit].max() < world.BRIGHT - 0.05
        assert world.room(name, wall, lamp)[lit].max(-1).min() > world.BRIGHT + 0.25


def test_full_length_vae_equals_the_stock_one() -> None:
    torch.manual_seed(0)
    vae, video = vae_full.build().eval(), torch.rand(1, 3, 17, 64, 64) * 2 - 1
    with torch.no_grad():
        mean, _ = vae_full.encode(vae, video)
        assert torch.allclose(mean, vae.encode(video).latent_dist.mode(), atol=1e-5)
        assert torch.allclose(vae_full.decode(vae, mean).clamp(-1, 1), vae.decode(mean).sample, atol=1e-5)


@pytest.mark.parametrize("length", [9, 16, 512])
def test_chunked_forward_equals_the_masked_stock_model(length: int) -> None:
    torch.manual_seed(0)
    model, words = chunked.build().eval(), torch.randn(1, 8, 48)
    layout = chunked.Layout((2, 1, 1))
    clean, noisy = torch.randn(1, 16, 12, 4, 4), torch.randn(1, 16, 12, 4, 4)
    parts, told = [], []
    for index, chunk in enumerate(layout.chunk_of):
        source = clean if index in layout.clean else noisy
        parts.append(chunked.group(source)[:, chunk])
        told.append(0.0 if index in layout.clean else 700.0)
    with torch.no_grad():
        forward = chunked.ChunkedForward(model, layout.copies)
        one, padded = torch.tensor([8]), torch.tensor([length])
        out = forward(torch.stack(parts, 1), torch.tensor([told]), words, one, padded)
        stock_words = torch.cat([words, torch.zeros(1, length - 8, 48)], 1)
        model.set_attn_processor(sampler.BlockCausalProcessor(64))
        for chunk in range(3):
            now = noisy[:, :, 4 * chunk : 4 * chunk + 4]
            reference = sampler.velocity(model, clean[:, :, : 4 * chunk], now, torch.tensor(700.0), stock_words)
            last = max(i for i, g in enumerate(layout.noisy) if layout.chunk_of[g] == chunk)
            assert torch.allclose(out[:, last], chunked.group(reference)[:, 0], atol=1e-5)


def test_training_tokens_are_what_the_loss_assumes() -> None:
    torch.manual_seed(0)
    layout, latents = chunked.Layout((4, 2, 2, 2, 2)), torch.randn(2, 16, 20, 4, 4)
    tokens, told, target = train_transformer.prepare(latents, layout)
    sigma = told[:, layout.noisy, None, None] / 1000
    chunks = chunked.group(latents)[:, [layout.chunk_of[g] for g in layout.noisy]]
    assert torch.allclose(tokens[:, layout.noisy] - sigma * target, chunks, atol=1e-5)
    assert told[:, layout.clean].max() <= 200
    assert (told[:, layout.clean] == 0).any()


def test_muon_steps_are_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_tokenizer_knows_every_caption() -> None:
    tokenizer = text.build_tokenizer()
    for scene in world.SCENES:
        ids = tokenizer(scene.caption)["input_ids"]
        assert len(ids) == text.CAPTION_TOKENS
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id


def test_exported_pipeline_loads_without_kvpack(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export.write(tmp_path / "pipeline", *export.parts(tmp_path / "nothing"))
    check_pipeline(tmp_path / "pipeline")


def test_shipped_pipeline_loads_and_is_small() -> None:
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*")) < 15e6
    check_pipeline(SHIPPED)


def check_pipeline(folder: Path) -> None:
    """It loads offline, generates and repeats itself."""
    pipe = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    made = [
        pipe(
            SCENE.caption,
            height=64,
            width=64,
            num_frames=5,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=seed,
            max_sequence_length=16,
        ).frames
        for seed in seeds
    ]
    assert made[0].shape == (1, 5, 64, 64, 3)
    assert np.isfinite(made[0]).all()
    assert np.array_equal(*made)


@pytest.mark.slow
def test_smoke_chain_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(words: list[str], check: bool) -> None:
        """Run a step as `python -m` does, in this process, which has imported what it needs."""
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_path(str(ROOT / f"{words[2].replace('.', '/')}.py"), run_name="__main__")

    with monkeypatch.context() as patch:
        patch.setattr(recipe.subprocess, "run", here)
        recipe.make(tmp_path, tmp_path / "pipeline", smoke=True)
    assert (tmp_path / "pipeline" / "model_index.json").exists()
    command = [sys.executable, "-m", "benchmarks.toyworld", "--smoke", "--out", str(tmp_path)]
    again = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert again.count("done before") == len(recipe.STEPS)


def averaged(rank: int, processes: int, folder: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), float(rank))
    extra = parallel.average_gradients([parameter], 10.0 * rank)
    (folder / str(rank)).write_text(f"{processes} {extra} {parameter.grad.tolist()}")


def test_processes_average_their_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.mp, "spawn", partial(mp.start_processes, start_method="fork"))  # imports nothing
    parallel.launch(averaged, (tmp_path,), 2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2 5.0 [0.5, 0.5, 0.5]"] * 2


def test_the_readme_says_every_step() -> None:
    text = (ROOT / "benchmarks/toyworld/README.md").read_text()
    for step in recipe.STEPS:
        assert f"`{step.format(out='runs/toyworld', to=recipe.SHIPPED)}`" in text
