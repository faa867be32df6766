"""Swin transformer V2: cosine attention, a computed position bias, norms behind the branches.

    scores = t * cos(q, k) + 16 sigmoid(cpb(log offset))      t = exp(logit_scale), at most 100
    x = x + norm1(attn(x));  x = x + norm2(mlp(x))

The network sees offsets on a logarithmic scale relative to the window of pretraining, so weights
move to other window sizes without interpolation. The keys have no bias.
Paper: Liu et al. 2021, arXiv:2111.09883. Shapes as in swin.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference_models.beit import relative_index
from reference_models.layers import Attention
from reference_models.swin import PatchMerging, SwinBlock, SwinConfig, SwinTransformer, for_all_windows


@dataclass(frozen=True)
class SwinV2Config(SwinConfig):
    """Sizes of a Swin V2; pretrained_windows, those of pretraining, 0 for the present one."""

    name: str = "swinv2-tiny-patch4-window8-256"
    image_size: int | tuple[int, int] = 256
    window: int | tuple[int, ...] = 8
    pretrained_windows: tuple[int, ...] = (0, 0, 0, 0)
    family: str = "swinv2"

    def window_of(self, stage: int) -> int:
        """The window is cut to the grid: weights do not depend on its size."""
        return min(super().window_of(stage), max(self.grid[0] >> stage, 1))


class PositionLinear(nn.Linear):
    """A layer of the position network, of its own class so that "all-linear" spares it."""


class CosineAttention(Attention):
    """Attention by the angle between q and k, (B n, N, d) -> (B n, N, d)."""

    def __init__(self, dim: int, heads: int, window: int, pretrained: int, qkv_bias: bool = True):
        super().__init__(dim, heads, qkv_bias, key_bias=False)
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        layers = (PositionLinear(2, 512), nn.ReLU(), PositionLinear(512, heads, bias=False))
        self.cpb_mlp = nn.Sequential(*layers)
        self.register_buffer("index", relative_index(window, window), persistent=False)
        self.register_buffer("offsets", log_offsets(window, pretrained), persistent=False)

    def position_bias(self) -> Tensor:
        """(h, N, N), between 0 and 16, added to the scores."""
        table = self.cpb_mlp(self.offsets.to(self.logit_scale.dtype))  # ((2 w - 1)^2, h)
        return 16 * torch.sigmoid(table.T[:, self.index])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Scaled so that the division by sqrt(d/h) in the common form leaves t cos(q, k)."""
        t = self.logit_scale.clamp(max=math.log(100)).exp()  # (h, 1, 1)
        q = (F.normalize(q, dim=-1) * (t * math.sqrt(q.shape[-1]))).to(v.dtype)
        return super().attend(q, F.normalize(k, dim=-1).to(v.dtype), v, for_all_windows(mask, v))


def log_offsets(window: int, pretrained: int = 0) -> Tensor:
    """sign(o) log2(1 + 8 |o| / (pretrained - 1)) / 3 of all offsets (dy, dx), ((2 w - 1)^2, 2)."""
    steps = torch.arange(1 - window, window, dtype=torch.float32) * 8 / max((pretrained or window) - 1, 1)
    steps = steps.sign() * torch.log2(1 + steps.abs()) / 3
    return torch.cartesian_prod(steps, steps)


class SwinV2Block(SwinBlock):
    """x = x + norm1(attn(x)) in windows; x = x + norm2(mlp(x)), (B, H, W, d) -> (B, H, W, d)."""

    def __init__(self, config: SwinV2Config, stage: int, shifted: bool):
        whole = config.grid[0] >> stage <= config.window_of(stage)  # one window holds the stage
        super().__init__(config, stage, shifted and not whole)

    def make_attention(self, config: SwinV2Config, stage: int, dim: int) -> Attention:
        pretrained = config.pretrained_windows[stage] if config.pretrained_windows else 0
        return CosineAttention(dim, config.heads[stage], self.window, pretrained, config.qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.windowed(x))
        return x + self.norm2(self.mlp(x))

    def shift_for(self, H: int, W: int) -> int:
        return self.shift


class PatchMergingV2(PatchMerging):
    """Like Swin's, with the norm behind the reduction."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(self.gather(x)))


class SwinTransformerV2(SwinTransformer):
    """Images (B, 3, H, W) of any size -> logits (B, num_classes)."""

    block, merging = SwinV2Block, PatchMergingV2
