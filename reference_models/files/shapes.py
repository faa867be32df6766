"""What the shapes of a file's tensors tell, by our names: classes, and the grid of positions."""

import math
from dataclasses import replace

from torch import Tensor

from reference_models.layers import resize_positions


def classes_in(shapes: dict[str, tuple]) -> int:
    """How many classes the head of a file has, 0 without one."""
    return shapes["head.weight"][0] if "head.weight" in shapes else 0


def fit_positions(config, shapes: dict[str, tuple], prefix: int, key: str = "pos_embed"):
    """With square pictures of as many patches as a file has positions behind its `prefix`."""
    count = shapes[key][1] - prefix if key in shapes else 0
    if count > 0 and count != math.prod(config.grid):
        config = replace(config, image_size=math.isqrt(count) * config.patch_size)
    return config


def adapt_positions(state: dict[str, Tensor], old, new, key: str = "pos_embed") -> None:
    """Interpolate the positions of patches in `state` to another grid, in place."""
    if key in state and old.grid != new.grid:
        prefix = state[key].shape[1] - math.prod(old.grid)
        state[key] = resize_positions(state[key], new.grid, prefix, old.grid)
