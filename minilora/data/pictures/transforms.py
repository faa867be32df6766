"""Picture -> tensor: resize for the model, augment where asked, scale to [0, 1], normalise.

`preprocess` is the dictionary that every model carries: image_size, resize ("squash" to the square,
or "shortest" edge) to `resize_to`, of which the middle is taken, interpolation, mean, std. Geometry
runs on the Pillow picture (antialiased); `Resize` stops before the normalisation, so that stored
uint8 pictures and files give the same bits.
"""

from collections.abc import Callable
from functools import reduce

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minilora.errors import UserError

AUGMENTATIONS = ("none", "basic", "rand")
MAX_EDGE = 8192  # a 20000 x 1 picture, resized by its shortest edge to 224, would take 12 GB


def build_transform(preprocess: dict, augment: str = "none") -> Callable[[Image.Image], Tensor]:
    """RGB picture -> (3, S, S) float32, normalised.

    augment: "none" (deterministic), "basic" (random resized crop + horizontal flip, torchvision's
    defaults) or "rand" (basic, then RandAugment; Cubuk et al. 2019, arXiv:1909.13719). All random
    numbers are torch's.
    """
    if augment not in AUGMENTATIONS:
        raise UserError(f"--augment {augment!r} is unknown; choose from {', '.join(AUGMENTATIONS)}")
    if augment == "none":
        return Chain((Resize(preprocess), Normalise(preprocess)))
    from torchvision.transforms import v2  # here: it takes a second

    mode = v2.InterpolationMode(resampling(preprocess).name.lower())
    steps = [v2.RandomResizedCrop(preprocess["image_size"], interpolation=mode), v2.RandomHorizontalFlip()]
    if augment == "rand":
        steps.append(v2.RandAugment())
    return Chain((*steps, to_tensor, Normalise(preprocess)))


class Chain(tuple):
    """torchvision's Compose without torchvision: x -> the last step of ... of the first of x."""

    def __call__(self, x: Image.Image) -> Tensor:
        return reduce(lambda x, step: step(x), self, x)


class Resize:
    """RGB picture -> (3, S, S) uint8, squashed or cropped as `preprocess` says."""

    def __init__(self, preprocess: dict):
        self.size, self.resample = preprocess["image_size"], resampling(preprocess)
        self.squash = preprocess.get("resize", "squash") == "squash"
        # without `crop`, as in runs of 0.1, a squashed picture has its size already
        cut = not self.squash or "crop" in preprocess
        self.edge = (cut and preprocess.get("resize_to")) or self.size
        self.down = preprocess.get("crop") == "down"

    def __call__(self, image: Image.Image) -> Tensor:
        if not self.squash:
            return to_tensor(shortest_then_crop(image, self.edge, self.size, self.resample, self.down))
        square = (self.edge, self.edge)
        image = image if image.size == square else image.resize(square, self.resample)
        return to_tensor(image if self.edge == self.size else centre(image, self.size, self.down))


class Normalise:
    """uint8 (..., 3, H, W) -> float32: (x / 255 - mean) / std as one multiplication and one sum.

    numpy, not torch: torch would wake threads, which have the model to compute, for every picture.
    """

    def __init__(self, preprocess: dict):
        mean = np.asarray(preprocess["mean"], dtype=np.float64).reshape(3, 1, 1)
        std = np.asarray(preprocess["std"], dtype=np.float64).reshape(3, 1, 1)
        self.scale, self.shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def __call__(self, pixels: Tensor) -> Tensor:
        x = np.multiply(pixels.numpy(), self.scale, dtype=np.float32)
        x += self.shift
        return torch.from_numpy(x)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)))


def resampling(preprocess: dict) -> Image.Resampling:
    """Pillow's filter for the name in `preprocess`."""
    name = preprocess.get("interpolation", "bilinear")
    try:
        return Image.Resampling[name.upper()]
    except KeyError:
        choices = ", ".join(mode.name.lower() for mode in Image.Resampling)
        raise UserError(f"interpolation {name!r} in the preprocessing is unknown; choose from {choices}") from None


def centre(image: Image.Image, size: int, down: bool) -> Image.Image:
    """The central size x size square. An odd border is halved downwards, as transformers does, or
    to the even number, as torchvision's CenterCrop does."""
    left, top = ((edge - size) // 2 if down else round((edge - size) / 2) for edge in image.size)
    # a crop beyond the border is filled with black
    return image.crop((left, top, left + size, top + size))


def shortest_then_crop(
    image: Image.Image, edge: int, size: int, resample: Image.Resampling, down: bool = False
) -> Image.Image:
    """Resize the shortest edge to `edge`, keep the ratio, cut the central size x size square.

    Sizes round as torchvision's Resize does.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if edge * long > MAX_EDGE * short:  # cut the middle first: what is cut off would never be seen
        keep = max(short * MAX_EDGE // edge, 1)
        left, top = (width - min(width, keep)) // 2, (height - min(height, keep)) // 2
        image = image.crop((left, top, left + min(width, keep), top + min(height, keep)))
        width, height = image.size
        short, long = min(width, height), max(width, height)
    longer = max(int(edge * long / short), edge)
    target = (edge, longer) if width <= height else (longer, edge)
    if image.size != target:
        image = image.resize(target, resample)
    return centre(image, size, down)
