"""The last steps of the input for a whole uint8 batch, on the device that trains: crop, flip,
RandAugment, normalise.

A batch of uint8 pictures is a quarter of the bytes that have to be copied, and the copy out of
pinned memory does not wait. The random numbers come from each item's own seed and are drawn on the
host, by the workers that read the pictures: the same ones on every device, in every batch, with any
number of workers, and after a resume.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from minilora.data.pictures.loader import seeded_cpu
from minilora.data.pictures.transforms import Normalise, resampling
from minilora.errors import UserError

ON_TENSORS = ("nearest", "bilinear", "bicubic")  # the filters that torchvision has for tensors
CROP = v2.RandomResizedCrop(1)  # whatever the size, it draws the same boxes


def draw(seed: int, shape: tuple[int, int], pixels: Tensor, augment: str) -> dict[str, Tensor]:
    """What an item's seed says of its crop: box (5,) is (top, left, height, width) in `pixels`
    (3, H, W) and whether it is flipped; for RandAugment `state` is the generator's from there on.

    The box is drawn in a picture of `shape` (width, height), as in files.
    """
    height, width = pixels.shape[-2:]
    down, right = height / shape[1], width / shape[0]
    with seeded_cpu(seed):
        box = CROP.make_params([torch.empty(1).expand(3, shape[1], shape[0])])
        flip = bool(torch.rand(1) < 0.5)
        state = torch.get_rng_state()
    top, left = round(box["top"] * down), round(box["left"] * right)
    bottom = max(round((box["top"] + box["height"]) * down), top + 1)
    end = max(round((box["left"] + box["width"]) * right), left + 1)
    cut = (min(top, height - 1), min(left, width - 1), bottom - top, end - left)
    return {"box": torch.tensor([*cut, flip])} | ({"state": state} if augment == "rand" else {})


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
        self.rand = v2.RandAugment() if augment == "rand" else None

    def __call__(self, batches: Iterable[dict]) -> Iterator[dict]:
        for batch in batches:
            yield self.batch(batch)

    def batch(self, batch: dict) -> dict:
        """One batch; what was drawn for it is used up."""
        rest = {key: value for key, value in batch.items() if key not in ("image", "box", "state")}
        pixels = batch["image"].to(self.device, non_blocking=True)
        if "box" in batch:
            pixels = torch.stack([self.cropped(*row) for row in zip(pixels, batch["box"].tolist(), strict=True)])
        if self.rand and "state" in batch:
            pixels = torch.stack([self.changed(*row) for row in zip(pixels, batch["state"], strict=True)])
        return rest | {"image": self.normalised(pixels)}

    def cropped(self, pixels: Tensor, box: list[int]) -> Tensor:
        """(3, H, W) uint8 -> (3, S, S) uint8."""
        *cut, flip = box
        pixels = functional.resized_crop(pixels, *cut, [self.size, self.size], self.mode, antialias=True)
        return functional.horizontal_flip(pixels) if flip else pixels

    def changed(self, pixels: Tensor, state: Tensor) -> Tensor:
        """RandAugment, which draws from the state of the item's generator."""
        with seeded_cpu(state):
            return self.rand(pixels)

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> float32: transforms.Normalise, in the same order of arithmetic."""
        return pixels.to(torch.float32).mul_(self.scale).add_(self.shift)
