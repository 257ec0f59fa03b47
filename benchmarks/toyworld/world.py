"""Seeded renderer of captioned clips with exact ground truth: a shape bounces in a dark room and lights its walls.

Every wall has a lamp of its own colour. The wall that the object touched last is lit and tints the room, until another
is touched. The caption names the object's colour, its shape and the background; its size, its speed and the colours of
the four lamps are in the video only, so what a wall looks like when it is lit again can only be remembered.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from kvpack.evaluation.tiny import BRIGHT as BRIGHT
from kvpack.evaluation.tiny import WALL, WALLS, wall_mask

Array = npt.NDArray[np.float32]
Video = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

SIZE = 64
FPS = 16
FRAMES = 81

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.90, 0.25),
    "blue": (0.20, 0.35, 1.00),
    "yellow": (1.00, 0.90, 0.15),
    "magenta": (0.95, 0.25, 0.90),
    "cyan": (0.15, 0.90, 0.95),
    "orange": (1.00, 0.55, 0.10),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "night stripes": (0.06, 0.08, 0.22),
    "dark checks": (0.05, 0.17, 0.10),
    "dusk rings": (0.20, 0.07, 0.16),
    "plain slate": (0.16, 0.17, 0.18),
}
RADIUS, HALF_SIDE, CIRCUMRADIUS = 9.0, 8.0, 13.0  # pixels, at scale 1

LAMPS = ("red", "green", "blue", "yellow", "magenta", "cyan")  # colours that a lamp can have
GLOW = 0.25  # how much light a lamp adds beside its wall; a quarter of it reaches the other side


@dataclass(frozen=True)
class Rules:
    """What varies in a world beside what the caption says.

    Args:
        colours: colours that an object can have.
        scale: smallest and largest size, relative to `RADIUS`, `HALF_SIDE` and `CIRCUMRADIUS`.
        speed: lowest and highest speed in pixels a second.
        lamps: whether the walls have lamps; without, centres turn at 12 and 52 pixels, whatever the shape.
    """

    colours: tuple[str, ...]
    scale: tuple[float, float]
    speed: tuple[float, float]
    lamps: bool


PLAIN = Rules(LAMPS, (1.0, 1.0), (24.0, 24.0), lamps=False)
LIT = Rules(tuple(COLOURS), (0.8, 1.2), (16.0, 44.0), lamps=True)
RULES = {"plain": PLAIN, "lit": LIT}


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
    """A rendered clip; positions and velocities are (x, y) in pixels and pixels a second.

    Args:
        scene: what the caption says.
        video: pixels, [T, H, W, 3].
        mask: pixels of the object, [T, H, W].
        position: centre of the object, [T, 2].
        velocity: its velocity, [T, 2].
        scale: its size.
        lamps: colour of each wall's lamp, in the order of `WALLS`; empty where there are none.
        lit: index of the wall that is lit, [T]; -1 where none is.
    """

    scene: Scene
    video: Video
    mask: Mask
    position: Array
    velocity: Array
    scale: float
    lamps: tuple[str, ...]
    lit: Indices

    @property
    def bright(self) -> Mask:
        """The mask of the object and of the lit wall, [T, H, W]."""
        strips = np.stack([wall_mask(wall) for wall in WALLS] + [np.zeros((SIZE, SIZE), bool)])
        return self.mask | strips[self.lit]


SCENES = tuple(Scene(*parts) for parts in product(COLOURS, SHAPES, BACKGROUNDS))


def _held_out() -> tuple[Scene, ...]:
    colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
    picks = [(c, c % 3, c % 4) for c in range(6)] + [(c, (c + 1) % 3, (c + 2) % 4) for c in range(4)]
    picks += [(6, 0, 1), (6, 1, 2), (6, 2, 3), (7, 1, 0), (7, 2, 1), (7, 0, 3)]
    return tuple(Scene(colours[c], SHAPES[s], backgrounds[b]) for c, s, b in picks)


HELD_OUT = _held_out()
TRAIN = tuple(scene for scene in SCENES if scene not in HELD_OUT)


def first_scenes(count: int) -> tuple[Scene, ...]:
    """Return so many scenes: the held-out ones, and behind them some that training saw, in a seeded order."""
    return (*HELD_OUT, *random.Random(0).sample(TRAIN, len(TRAIN)))[:count]


def scenes_of(rules: Rules) -> tuple[Scene, ...]:
    """Return the training scenes of a world."""
    return tuple(scene for scene in TRAIN if scene.colour in rules.colours)


def background(name: str) -> Array:
    """Render the static texture of a background, [H, W, 3] in 0..1."""
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


def room(name: str, wall: str, lamp: str) -> Array:
    """Render a background with one wall lit, [H, W, 3] in 0..1."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    distance = {"left": x, "right": SIZE - 1 - x, "top": y, "bottom": SIZE - 1 - y}[wall]
    colour = np.asarray(COLOURS[lamp], np.float32)
    light = GLOW * (1 - 0.75 * distance / SIZE)
    tinted = background(name) + light[..., None] * colour
    return np.asarray(np.where(wall_mask(wall)[..., None], colour, tinted), np.float32)


def extents(shape: str, scale: float) -> tuple[float, float, float, float]:
    """Return how far a shape reaches from its centre to the left, right, top and bottom, in pixels."""
    if shape == "triangle":
        side = CIRCUMRADIUS * scale * float(np.sqrt(0.75))
        return side, side, CIRCUMRADIUS * scale, CIRCUMRADIUS * scale / 2
    reach = scale * (RADIUS if shape == "circle" else HALF_SIDE)
    return reach, reach, reach, reach


def limits(shape: str, scale: float, rules: Rules) -> tuple[Array, Array]:
    """Return where the centre turns round: lowest and highest (x, y)."""
    if not rules.lamps:
        return np.full(2, 12, np.float32), np.full(2, 52, np.float32)
    left, right, top, bottom = extents(shape, scale)
    end = SIZE - 1 - WALL
    return np.array([WALL + left, WALL + top], np.float32), np.array([end - right, end - bottom], np.float32)


def fold(value: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Reflect straight paths at the walls: the folded value and the sign of its direction."""
    span = high - low
    phase = np.mod(value - low, 2 * span)
    folded = low + np.where(phase > span, 2 * span - phase, phase)
    return folded.astype(np.float32), np.where(phase > span, -1.0, 1.0).astype(np.float32)


def touched(straight: Array, velocity: Array, low: Array, high: Array) -> Indices:
    """Return the wall that an unfolded path [T, 2] touched last, at every frame."""
    phase = (straight - low) / (high - low)
    bound = np.where(velocity > 0, np.floor(phase), np.ceil(phase))
    since = np.abs(phase - bound) * (high - low) / np.maximum(np.abs(velocity), 1e-6)
    axis = since.argmin(1)
    side = np.take_along_axis(np.mod(bound, 2), axis[:, None], 1)[:, 0]
    return (2 * axis + side).astype(np.int64)


def coverage(shape: str, position: Array, scale: float = 1.0) -> Array:
    """Return how much of each pixel the object covers, [T, H, W] in 0..1."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    dx = x - position[:, 0, None, None]
    dy = y - position[:, 1, None, None]
    if shape == "circle":
        distance = np.hypot(dx, dy) - scale * RADIUS
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - scale * HALF_SIDE
    else:
        slope = np.abs(dx) * np.float32(np.sqrt(3) / 2) - dy / 2
        distance = np.maximum(dy, slope) - scale * CIRCUMRADIUS / 2
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def make_clip(scene: Scene, seed: int, frames: int = FRAMES, rules: Rules = LIT) -> Clip:
    """Render the clip of one scene and one seed; a longer clip of the same seed begins with the shorter one."""
    rng = np.random.default_rng(seed)
    angle, speed, scale = rng.uniform(0, 2 * np.pi), rng.uniform(*rules.speed), rng.uniform(*rules.scale)
    velocity = (speed * np.array([np.cos(angle), np.sin(angle)])).astype(np.float32)
    low, high = limits(scene.shape, scale, rules)
    start = rng.uniform(low, high).astype(np.float32)
    seconds = np.arange(frames, dtype=np.float32)[:, None] / FPS
    straight = (start + velocity * seconds).astype(np.float32)
    position, sign = fold(straight, low, high)
    alpha = coverage(scene.shape, position, scale)[..., None]
    if rules.lamps:
        lamps = tuple(str(lamp) for lamp in rng.permutation(LAMPS)[: len(WALLS)])
        lit = touched(straight, velocity, low, high)
        backs = np.stack([room(scene.background, wall, lamp) for wall, lamp in zip(WALLS, lamps, strict=True)])[lit]
    else:
        lamps, lit, backs = (), np.full(frames, -1), background(scene.background)[None]
    pixels = backs * (1 - alpha) + np.asarray(COLOURS[scene.colour], np.float32) * alpha
    video = np.round(pixels * 255).astype(np.uint8)
    return Clip(scene, video, alpha[..., 0] > 0.5, position, velocity * sign, scale, lamps, lit)
