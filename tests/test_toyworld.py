"""The toy world: its renderer tells the truth, its measures notice what is wrong, its chain runs end to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from benchmarks.toyworld import chunked, export, measure, sampler, text, train_transformer, vae_full, world
from benchmarks.toyworld.optim import orthogonalise

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "kvpack" / "data" / "toyworld"
TOLERANCE = {"path_fit": 0.5}
SCENE = world.Scene("red", "circle", "dusk rings")


@pytest.fixture
def clip() -> world.Clip:
    return world.make_clip(SCENE, 7)


@pytest.mark.parametrize("scene", world.HELD_OUT, ids=lambda s: s.caption)
def test_ground_truth_matches_the_pixels(scene: world.Scene) -> None:
    clip = world.make_clip(scene, 3)
    seen = measure.object_mask(clip.video)
    assert np.mean(seen != clip.mask) < 2e-3
    found = measure.measure_frames(clip.video, scene).centre
    assert np.hypot(*(found - clip.position).T).max() < 0.5
    empty = ~clip.mask.any(0)
    drawn = clip.video[:, empty] / 255 - world.background(scene.background)[empty]
    assert np.abs(drawn[:, 1:-1]).mean() < 0.01


def test_motion_is_straight_at_one_speed(clip: world.Clip) -> None:
    steps = np.diff(clip.position, axis=0) * world.FPS
    straight = (np.sign(clip.velocity[1:]) == np.sign(clip.velocity[:-1])).all(1)
    assert np.allclose(steps[straight], clip.velocity[:-1][straight], atol=1e-2)
    assert np.allclose(np.hypot(*clip.velocity.T), world.SPEED, atol=1e-3)
    assert clip.position.min() >= world.LOW
    assert clip.position.max() <= world.HIGH


def test_clips_are_seeded_and_extend(clip: world.Clip) -> None:
    longer = world.make_clip(SCENE, 7, 2 * world.FRAMES)
    assert np.array_equal(longer.video[: world.FRAMES], clip.video)
    assert not np.array_equal(world.make_clip(SCENE, 8).video, clip.video)


def test_held_out_scenes_are_disjoint_and_fair() -> None:
    assert not set(world.TRAIN) & set(world.HELD_OUT)
    assert set(world.TRAIN) | set(world.HELD_OUT) == set(world.SCENES)
    assert len({scene.caption for scene in world.SCENES}) == 72
    assert len(world.HELD_OUT) == 10
    for part in ("colour", "shape", "background"):
        assert {getattr(s, part) for s in world.TRAIN} == {getattr(s, part) for s in world.SCENES}
    words = [set(" ".join(names).split()) for names in (world.COLOURS, world.SHAPES, world.BACKGROUNDS)]
    assert sum(map(len, words)) == len(set.union(*words))


def test_objects_are_bright_and_backgrounds_dark() -> None:
    assert min(max(colour) for colour in world.COLOURS.values()) > world.BRIGHT + 0.25
    assert max(world.background(name).max() for name in world.BACKGROUNDS) < world.BRIGHT - 0.25


@pytest.mark.parametrize("shape", world.SHAPES)
def test_truth_measures_perfect(shape: str) -> None:
    scene = world.Scene("cyan", shape, "night stripes")
    result = measure.summarise(world.make_clip(scene, 11).video, scene)
    assert (result.visible, result.right_size, result.colour, result.shape) == (1, 1, 1, 1)
    assert (result.straight, result.moving) == (1, 1)
    assert result.path_fit < 0.6
    assert result.background_error < 0.01


def changed(before: measure.Summary, after: measure.Summary, *but: str) -> set[str]:
    """The measures that moved by more than a little."""
    names = set(before.__dataclass_fields__) - set(but)
    return {name for name in names if abs(getattr(before, name) - getattr(after, name)) > TOLERANCE.get(name, 0.02)}


def test_recoloured_object_lowers_only_colour(clip: world.Clip) -> None:
    video = clip.video.copy()
    video[clip.mask] = video[clip.mask][:, [1, 0, 2]]
    before, after = measure.summarise(clip.video, SCENE), measure.summarise(video, SCENE)
    assert changed(before, after, "background_error") == {"colour"}
    assert after.colour == 0


def test_other_shape_lowers_shape(clip: world.Clip) -> None:
    square, _ = world.render(world.Scene("red", "square", "dusk rings"), clip.position)
    assert changed(measure.summarise(clip.video, SCENE), measure.summarise(square, SCENE)) == {"shape"}


def test_other_background_raises_only_background_error(clip: world.Clip) -> None:
    other, _ = world.render(world.Scene("red", "circle", "plain slate"), clip.position)
    assert changed(measure.summarise(clip.video, SCENE), measure.summarise(other, SCENE)) == {"background_error"}


def test_empty_video_shows_nothing() -> None:
    video = np.round(np.tile(world.background("dusk rings"), (48, 1, 1, 1)) * 255).astype(np.uint8)
    result = measure.summarise(video, SCENE)
    assert (result.visible, result.right_size, result.straight) == (0, 0, 0)
    assert result.background_error < 0.01


def test_frozen_video_fails_motion(clip: world.Clip) -> None:
    frozen = np.repeat(clip.video[:1], world.FRAMES, 0)
    assert changed(measure.summarise(clip.video, SCENE), measure.summarise(frozen, SCENE), "path_fit") == {
        "straight",
        "moving",
    }


def test_jumping_object_fails_path_fit(clip: world.Clip) -> None:
    shuffled = clip.video[np.random.default_rng(0).permutation(world.FRAMES)]
    result = measure.summarise(shuffled, SCENE)
    assert result.path_fit > 4
    assert result.straight == 0
    assert result.colour == 1


def test_swollen_object_has_the_wrong_size(clip: world.Clip) -> None:
    swollen = clip.video.copy()
    for axis in (1, 2):
        for step in (-2, 2):
            swollen = np.maximum(swollen, np.roll(swollen, step, axis))
    result = measure.summarise(swollen, SCENE)
    assert result.right_size == 0
    assert result.visible == 1
    assert result.straight == 1


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
def test_smoke_chain(tmp_path: Path) -> None:
    for script in ("train_vae", "encode", "train_transformer", "export", "evaluate"):
        extra = ["--pipeline", tmp_path / "pipeline"] if script == "evaluate" else ["--out", tmp_path]
        smoke = [] if script == "export" else ["--smoke"]
        command = [sys.executable, "-m", f"benchmarks.toyworld.{script}", *map(str, extra), *smoke]
        subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "pipeline" / "model_index.json").exists()
