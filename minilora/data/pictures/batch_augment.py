"""The last steps of the input for a whole uint8 batch, on the device that trains: crop, flip,
RandAugment, normalise.

A batch of uint8 pictures is a quarter of the bytes that have to be copied, and the copy out of
pinned memory does not wait. The random numbers come from each item's own seed and are drawn on
the host, so that they are the same on every device, in every batch, with any number of workers,
and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from minilora.data.pictures.loader import seeded_cpu
from minilora.data.pictures.transforms import Normalise, resampling
from minilora.errors import UserError

ON_TENSORS = ("nearest", "bilinear", "bicubic")  # the filters that torchvision has for tensors


class Finish:
    """uint8 batches of a ShardDataset -> batches whose `image` (B, 3, S, S) is float32,
    normalised, on the device.

    augment as in transforms.build_transform. Raises UserError for a filter that only Pillow has.
    """

    def __init__(self, preprocess: dict, augment: str, device: torch.device):
        self.size, self.device = preprocess["image_size"], device
        normalise = Normalise(preprocess)
        self.scale, self.shift = (torch.from_numpy(x).to(device) for x in (normalise.scale, normalise.shift))
        name = resampling(preprocess).name.lower()
        if augment != "none" and name not in ON_TENSORS:
            raise UserError(
                f"--augment {augment} from shards cannot resize by {name}; train from the files, or use --augment none"
            )
        self.mode = v2.InterpolationMode(name)
        self.crop = v2.RandomResizedCrop(self.size)
        self.rand = v2.RandAugment() if augment == "rand" else None

    def __call__(self, batches: Iterable[dict]) -> Iterator[dict]:
        for batch in batches:
            yield self.batch(batch)

    def batch(self, batch: dict) -> dict:
        """One batch; `draw` and `shape` are used up."""
        rest = {key: value for key, value in batch.items() if key not in ("image", "draw", "shape")}
        pixels = batch["image"].to(self.device, non_blocking=True)
        if "draw" in batch:
            rows = zip(pixels, batch["draw"].tolist(), batch["shape"].tolist(), strict=True)
            pixels = torch.stack([self.augmented(*row) for row in rows])
        return rest | {"image": self.normalised(pixels)}

    def augmented(self, pixels: Tensor, seed: int, shape: tuple[int, int]) -> Tensor:
        """(3, H, W) uint8 -> (3, S, S) uint8; the box is drawn in one of `shape` (width,
        height), as in files."""
        height, width = pixels.shape[-2:]
        down, right = height / shape[1], width / shape[0]
        with seeded_cpu(seed):
            box = self.crop.make_params([torch.empty(1).expand(3, shape[1], shape[0])])
            flip = torch.rand(1) < 0.5
            top, left = round(box["top"] * down), round(box["left"] * right)
            bottom = max(round((box["top"] + box["height"]) * down), top + 1)
            end = max(round((box["left"] + box["width"]) * right), left + 1)
            side = [self.size, self.size]
            cut = (min(top, height - 1), min(left, width - 1), bottom - top, end - left)
            pixels = functional.resized_crop(pixels, *cut, side, self.mode, antialias=True)
            if flip:
                pixels = functional.horizontal_flip(pixels)
            return self.rand(pixels) if self.rand else pixels

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> float32: transforms.Normalise, in the same order of arithmetic."""
        return pixels.to(torch.float32).mul_(self.scale).add_(self.shift)
