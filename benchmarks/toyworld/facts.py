"""What is known of a clip beside its pixels, for `kvpack.evaluation`."""

from __future__ import annotations

import numpy as np

from benchmarks.toyworld import world
from benchmarks.toyworld.world import Array, Scene
from kvpack.evaluation import Facts
from kvpack.evaluation.tiny import brightness

MIDDLE = world.SIZE / 2


def glow(wall: str) -> Array:
    """Return how much of its lamp's colour a lit wall adds to each pixel, [H, W]."""
    name = "plain slate"
    lit = world.room(name, wall, "white") - world.background(name)
    return np.asarray(np.where(world.wall_mask(wall), 0, lit[..., 0] / world.COLOURS["white"][0]), np.float32)


def facts_of(scene: Scene) -> Facts:
    """Return a scene's facts: its caption's words, the other words it could have, and where the walls are."""
    size = float(np.mean(world.LIT.scale))
    middle = np.full((1, 2), MIDDLE, np.float32)
    return Facts(
        fps=world.FPS,
        subject=brightness,
        colour=scene.colour,
        palette=world.COLOURS,
        shape=scene.shape,
        shapes={shape: world.coverage(shape, middle, size)[0] for shape in world.SHAPES},
        background=scene.background,
        backgrounds={name: world.background(name) for name in world.BACKGROUNDS},
        landmarks={wall: world.wall_mask(wall) for wall in world.WALLS},
        glow={wall: glow(wall) for wall in world.WALLS},
        bright=world.BRIGHT,
    )
