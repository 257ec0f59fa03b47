"""Seeded renderer of captioned clips with exact ground truth: one bright shape bouncing over a dark background."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Video = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

SIZE = 64
FPS = 16
FRAMES = 81
SPEED = 24.0  # pixels a second
LOW, HIGH = 12.0, 52.0  # where the centre of an object turns round, the same for every shape
BRIGHT = 0.58  # the brightest channel is above this on the object and below it on every background

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.90, 0.25),
    "blue": (0.20, 0.35, 1.00),
    "yellow": (1.00, 0.90, 0.15),
    "magenta": (0.95, 0.25, 0.90),
    "cyan": (0.15, 0.90, 0.95),
}
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "night stripes": (0.06, 0.08, 0.22),
    "dark checks": (0.05, 0.17, 0.10),
    "dusk rings": (0.20, 0.07, 0.16),
    "plain slate": (0.16, 0.17, 0.18),
}
RADIUS, HALF_SIDE, CIRCUMRADIUS = 9.0, 8.0, 13.0


@dataclass(frozen=True)
class Scene:
    """What a caption says: the colour and the shape of the object, and the background."""

    colour: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        """The sentence the models are trained on."""
        return f"a {self.colour} {self.shape} bouncing over {self.background}"


@dataclass(frozen=True)
class Clip:
    """A rendered clip; positions and velocities are (x, y) in pixels and pixels a second."""

    scene: Scene
    video: Video
    mask: Mask
    position: Array
    velocity: Array


SCENES = tuple(Scene(*parts) for parts in product(COLOURS, SHAPES, BACKGROUNDS))


def _held_out() -> tuple[Scene, ...]:
    colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
    picks = [(c, c % 3, c % 4) for c in range(6)] + [(c, (c + 1) % 3, (c + 2) % 4) for c in range(4)]
    return tuple(Scene(colours[c], SHAPES[s], backgrounds[b]) for c, s, b in picks)


HELD_OUT = _held_out()
TRAIN = tuple(scene for scene in SCENES if scene not in HELD_OUT)


def background(name: str) -> Array:
    """The static texture of a background, [H, W, 3] in 0..1."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    wave = 2 * np.pi / SIZE
    texture = {
        "night stripes": np.sin(2 * wave * (x + y)),
        "dark checks": np.sin(2 * wave * x) * np.sin(2 * wave * y),
        "dusk rings": np.cos(2.5 * wave * np.hypot(x - 31.5, y - 31.5)),
        "plain slate": np.zeros_like(x),
    }[name]
    base = np.asarray(BACKGROUNDS[name], np.float32)
    return np.asarray(base * (1 + 0.3 * texture[..., None]), np.float32)


def fold(value: Array) -> tuple[Array, Array]:
    """Reflect straight paths at the walls: the folded value and the sign of its direction."""
    span = HIGH - LOW
    phase = np.mod(value - LOW, 2 * span)
    return LOW + np.where(phase > span, 2 * span - phase, phase), np.where(phase > span, -1.0, 1.0).astype(np.float32)


def path(rng: np.random.Generator, frames: int) -> tuple[Array, Array]:
    """Positions and velocities, [T, 2] each, of one bouncing object."""
    angle = rng.uniform(0, 2 * np.pi)
    velocity = SPEED * np.array([np.cos(angle), np.sin(angle)], np.float32)
    start = rng.uniform(LOW, HIGH, 2).astype(np.float32)
    seconds = np.arange(frames, dtype=np.float32)[:, None] / FPS
    position, sign = fold((start + velocity * seconds).astype(np.float32))
    return position.astype(np.float32), (velocity * sign).astype(np.float32)


def coverage(shape: str, position: Array) -> Array:
    """How much of each pixel the object covers, [T, H, W] in 0..1."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    dx = x - position[:, 0, None, None]
    dy = y - position[:, 1, None, None]
    if shape == "circle":
        distance = np.hypot(dx, dy) - RADIUS
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - HALF_SIDE
    else:
        slope = np.abs(dx) * np.float32(np.sqrt(3) / 2) - dy / 2
        distance = np.maximum(dy, slope) - CIRCUMRADIUS / 2
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def render(scene: Scene, position: Array) -> tuple[Video, Mask]:
    """Pixels, [T, H, W, 3], and the object's mask, [T, H, W]."""
    alpha = coverage(scene.shape, position)
    colour = np.asarray(COLOURS[scene.colour], np.float32)
    pixels = background(scene.background) * (1 - alpha[..., None]) + colour * alpha[..., None]
    return np.round(pixels * 255).astype(np.uint8), alpha > 0.5


def make_clip(scene: Scene, seed: int, frames: int = FRAMES) -> Clip:
    """The clip of one scene and one seed; a longer clip of the same seed begins with the shorter one."""
    position, velocity = path(np.random.default_rng(seed), frames)
    video, mask = render(scene, position)
    return Clip(scene, video, mask, position, velocity)
