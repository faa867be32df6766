"""Pictures of plain shapes, drawn on the fly: the data of the demonstrations.

Two classification tasks that share no shape and no colour:
  source  48 classes, 6 colours x 8 shapes: the bundled nano ViT was trained on these
          (commands/pretrain)
  target  8 classes, 8 other shapes in 6 other colours, turned a little further: `train.py`
          fine-tunes it on these
Picture i of a set depends only on (seed, set, i).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from minilora.data.pictures.folder import Sample, Split, Splits

SIZE = 48  # pixels
OVERSAMPLING = 2  # masks are drawn twice as large and averaged, for smooth edges

SOURCE_COLOURS = {
    "red": (214, 40, 40), "green": (44, 160, 60), "blue": (40, 80, 210),
    "yellow": (235, 210, 40), "magenta": (210, 50, 190), "cyan": (50, 200, 215),
}  # fmt: skip
TARGET_COLOURS = {
    "orange": (240, 135, 30), "purple": (150, 90, 220), "white": (240, 240, 240),
    "teal": (40, 175, 160), "pink": (245, 150, 175), "lime": (160, 225, 60),
}  # fmt: skip
COLOURS = SOURCE_COLOURS | TARGET_COLOURS


def _ring(n: int, radius: float = 1.0, turn: float = 0.0, squeeze: float = 1.0) -> np.ndarray:
    """n points on a circle (n, 2), the first at the top; `squeeze` flattens it."""
    angle = 2 * math.pi * (np.arange(n) / n + turn) - math.pi / 2
    return np.stack([radius * np.cos(angle), squeeze * radius * np.sin(angle)], axis=1)


def _star(points: int, inner: float) -> np.ndarray:
    outline = _ring(2 * points)
    outline[1::2] *= inner
    return outline


def _crescent() -> np.ndarray:
    """The unit circle without the circle around (0.5, 0) that meets it at the tips, +-50 deg."""
    outer = np.radians(np.linspace(50, 310, 24))
    tip = math.atan2(math.sin(outer[0]), math.cos(outer[0]) - 0.5)
    inner = np.linspace(2 * math.pi - tip, tip, 16)
    far = math.hypot(math.sin(outer[0]), math.cos(outer[0]) - 0.5)
    arcs = np.stack([np.cos(outer), np.sin(outer)], 1), far * np.stack([np.cos(inner), np.sin(inner)], 1)
    return np.concatenate([arcs[0], arcs[1] + (0.5, 0)])


def _path(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float64).reshape(-1, 2)


# Outlines in [-1, 1]^2, y downwards; a second outline is a hole.
OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "circle": (_ring(28),),
    "square": (_ring(4, 1.2, 0.125),),
    "triangle": (_ring(3, 1.1),),
    "star": (_star(5, 0.42),),
    "plus": (_path(-.33,-1, .33,-1, .33,-.33, 1,-.33, 1,.33, .33,.33,
                   .33,1, -.33,1, -.33,.33, -1,.33, -1,-.33, -.33,-.33),),
    "heart": (_path(0,-.45, .3,-.85, .7,-.85, 1,-.45, .9,.05, 0,.95, -.9,.05, -1,-.45, -.7,-.85, -.3,-.85),),
    "ring": (_ring(28), _ring(28, 0.5)),
    "bar": (_path(-1,-.4, 1,-.4, 1,.4, -1,.4),),
    "pentagon": (_ring(5),),
    "diamond": (_path(0,-1, .7,0, 0,1, -.7,0),),
    "crescent": (_crescent(),),
    "arrow": (_path(-1,-.3, .1,-.3, .1,-.85, 1,0, .1,.85, .1,.3, -1,.3),),
    "ell": (_path(-.8,-1, -.15,-1, -.15,.4, .8,.4, .8,1, -.8,1),),
    "tee": (_path(-.95,-.9, .95,-.9, .95,-.3, .32,-.3, .32,1, -.32,1, -.32,-.3, -.95,-.3),),
    "hourglass": (_path(-.8,-1, .8,-1, .15,0, .8,1, -.8,1, -.15,0),),
    "arch": (_path(-.9,.9, -.9,-.2, -.6,-.75, 0,-.95, .6,-.75, .9,-.2, .9,.9, .4,.9, .4,0, 0,-.4, -.4,0, -.4,.9),),
}  # fmt: skip
SOURCE_SHAPES = tuple(OUTLINES)[:8]
TARGET_SHAPES = tuple(OUTLINES)[8:]


def outline_mask(shape: str, x: float, y: float, radius: float, tilt: float = 0.0, size: int = SIZE) -> np.ndarray:
    """Coverage (size, size) float32 in [0, 1] of a shape at (x, y), turned by `tilt` radians."""
    canvas = Image.new("L", (size * OVERSAMPLING, size * OVERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    cos, sin = radius * math.cos(tilt), radius * math.sin(tilt)
    turn = np.array([[cos, sin], [-sin, cos]])
    for k, outline in enumerate(OUTLINES[shape]):
        points = (outline @ turn + (x, y)) * OVERSAMPLING
        draw.polygon(points.ravel().tolist(), fill=0 if k else 255)
    return np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.float32) / 255


def background(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """(size, size, 3) float32: a dark grey that changes slowly across the picture."""
    level, slope = rng.uniform(20, 80), rng.uniform(-15, 15, 2)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    tint = rng.uniform(-8, 8, 3).astype(np.float32)
    return (level + slope[0] * ramp[:, None, None] + slope[1] * ramp[None, :, None]) + tint


def paint(canvas: np.ndarray, mask: np.ndarray, colour: str, rng: np.random.Generator) -> np.ndarray:
    """The canvas with one shape of about that colour on it."""
    paint_colour = np.asarray(COLOURS[colour], dtype=np.float32) + rng.uniform(-18, 18, 3).astype(np.float32)
    return canvas + mask[:, :, None] * (paint_colour - canvas)


def finish(canvas: np.ndarray, rng: np.random.Generator, noise: float = 6.0) -> np.ndarray:
    """Canvas -> (H, W, 3) uint8 with some noise."""
    grain = rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas + noise * grain, 0, 255).astype(np.uint8)


def single(shape: str, colour: str, rng: np.random.Generator, tilt: float) -> np.ndarray:
    """(48, 48, 3) uint8: one large shape near the middle, turned by up to `tilt` radians."""
    radius = rng.uniform(13, 17)
    x, y = SIZE / 2 + rng.uniform(-3, 3, 2)
    canvas = background(rng)
    canvas = paint(canvas, outline_mask(shape, x, y, radius, rng.uniform(-tilt, tilt)), colour, rng)
    return finish(canvas, rng)


class ShapesSplit(Split):
    """A split whose pictures are drawn when asked for; `numbers` are theirs within the set."""

    def __init__(self, task: str, part: str, seed: int, numbers: Iterable[int]):
        self.task, self.part, self.seed, self.numbers = task, part, seed, list(numbers)
        names = len(task_classes(task))
        super().__init__((Sample(f"shapes/{task}/{part}/{n:06d}.png", n % names) for n in self.numbers), "shapes")

    def pixels(self, i: int) -> np.ndarray:
        """Picture i as (48, 48, 3) uint8."""
        number = self.numbers[i]
        rng = picture_rng(self.seed, self.task, self.part, number)
        if self.task == "source":
            colour, shape = divmod(number % 48, 8)
            return single(SOURCE_SHAPES[shape], tuple(SOURCE_COLOURS)[colour], rng, tilt=0.1)
        colour = tuple(TARGET_COLOURS)[rng.integers(len(TARGET_COLOURS))]
        return single(TARGET_SHAPES[number % 8], colour, rng, tilt=0.2)

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels(i))

    def take(self, indices: Iterable[int]) -> ShapesSplit:
        return ShapesSplit(self.task, self.part, self.seed, (self.numbers[i] for i in indices))


def picture_rng(seed: int, task: str, part: str, number: int) -> np.random.Generator:
    """The random numbers of one picture."""
    words = np.frombuffer(f"{task}/{part}".encode().ljust(24, b" ")[:24], dtype="<u4")
    return np.random.default_rng([seed, number, *words.tolist()])


def task_classes(task: str) -> list[str]:
    """Class names of "source" (colour shape) or "target" (shape)."""
    if task == "source":
        return [f"{colour} {shape}" for colour in SOURCE_COLOURS for shape in SOURCE_SHAPES]
    return list(TARGET_SHAPES)


def classification_splits(
    task: str = "target", train: int = 1500, val: int = 600, test: int = 600, seed: int = 0
) -> Splits:
    """The set as Splits; the labels go round in order, so every class is equally frequent."""
    parts = [ShapesSplit(task, part, seed, range(n)) for part, n in (("train", train), ("val", val), ("test", test))]
    return Splits(*parts, classes=task_classes(task))
