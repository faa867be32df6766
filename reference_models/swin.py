"""Swin transformer: attention within small windows, which every second block shifts by half a
window, and four neighbours merged into one token of twice the width between stages.

    grid 56 x 56, d --[blocks]--> merge --> 28 x 28, 2 d --[blocks]--> merge --> 14 x 14, 4 d ...

Paper: Liu et al. 2021, arXiv:2103.14030; swinv2.py changes attention and the place of the norms.
Shapes: B pictures, H x W grid of tokens, d width (of the stage), h heads, w window side, n windows
of a picture, N = w w tokens of a window. Where H or W is no multiple of w, zeros are appended right
and below, as transformers does; they take part in the attention.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from reference_models.beit import relative_index
from reference_models.layers import MLP, Attention, Classifier, PatchEmbed, PatchGrid, init_weights


@dataclass(frozen=True)
class SwinConfig(PatchGrid):
    """Sizes of a Swin; dim is the first stage's width, window a side or one for each stage."""

    name: str = "swin-tiny-patch4-window7-224"
    image_size: int | tuple[int, int] = 224
    patch_size: int = 4
    dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int | tuple[int, ...] = 7
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    eps: float = 1e-5
    act: str = "gelu"
    qkv_bias: bool = True
    absolute_positions: bool = False
    family: str = "swin"

    def window_of(self, stage: int) -> int:
        return self.window if isinstance(self.window, int) else self.window[stage]


class WindowAttention(Attention):
    """Attention among the N = w w tokens of each window, with a learned bias for every offset
    between two of them: relative_position_bias_table ((2 w - 1)(2 w - 1), h)."""

    def __init__(self, dim: int, heads: int, window: int, qkv_bias: bool = True):
        super().__init__(dim, heads, qkv_bias)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("index", relative_index(window, window), persistent=False)

    def position_bias(self) -> Tensor:
        """(h, N, N), added to the scores."""
        return self.relative_position_bias_table.T[:, self.index]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return super().attend(q, k, v, for_all_windows(mask, q))


def for_all_windows(mask: Tensor, q: Tensor) -> Tensor:
    """The mask of a picture's n windows (n, h, N, N), or of one (1, h, N, N), beside the queries
    (B n, h, N, d/h) of B pictures: in their precision first, then repeated."""
    mask = mask.to(q.dtype)
    return mask if len(mask) == 1 else mask.repeat(len(q) // len(mask), 1, 1, 1)


class SwinBlock(nn.Module):
    """x = x + attn(norm1(x)) in windows; x = x + mlp(norm2(x)), (B, H, W, d) -> (B, H, W, d)."""

    def __init__(self, config: SwinConfig, stage: int, shifted: bool):
        super().__init__()
        dim, self.window = config.dim * 2**stage, config.window_of(stage)
        self.shift = self.window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim, eps=config.eps)
        self.attn = self.make_attention(config, stage, dim)
        self.norm2 = nn.LayerNorm(dim, eps=config.eps)
        self.mlp = MLP(dim, int(config.mlp_ratio * dim), config.act)

    def make_attention(self, config: SwinConfig, stage: int, dim: int) -> Attention:
        return WindowAttention(dim, config.heads[stage], self.window, config.qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.windowed(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def shift_for(self, H: int, W: int) -> int:
        """No shift where one window holds the whole grid, or the whole of its shorter side."""
        return 0 if min(H, W) <= self.window else self.shift

    def windowed(self, x: Tensor) -> Tensor:
        """Attention within windows, (B, H, W, d) -> (B, H, W, d)."""
        (_, H, W, _), w = x.shape, self.window
        shift = self.shift_for(H, W)
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))  # (B, H', W', d), multiples of w
        padded = x.shape[1:3]
        bias = self.attn.position_bias()  # (h, N, N)
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            mask = shift_mask(*padded, w, shift, x.device)  # (n, 1, N, N)
            bias = bias + mask  # (n, h, N, N)
        x = self.attn(to_windows(x, w), bias if shift else bias.unsqueeze(0))  # (B n, N, d)
        x = from_windows(x, w, *padded)  # (B, H', W', d)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :H, :W]


def to_windows(x: Tensor, w: int) -> Tensor:
    """(B, H, W, d) -> (B n, w w, d), windows row by row."""
    x = x.unflatten(2, (-1, w)).unflatten(1, (-1, w))  # (B, H/w, w, W/w, w, d)
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def from_windows(x: Tensor, w: int, H: int, W: int) -> Tensor:
    """(B n, w w, d) -> (B, H, W, d)."""
    x = x.unflatten(1, (w, w)).unflatten(0, (-1, H // w, W // w))  # (B, H/w, W/w, w, w, d)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shift_mask(H: int, W: int, w: int, shift: int, device) -> Tensor:
    """After the shift the last windows hold tokens of opposite edges: -100 between those that were
    not neighbours, (n, 1, N, N), added to the scores."""
    y, x = torch.arange(H, device=device), torch.arange(W, device=device)
    region_y = (y >= H - w).int() + (y >= H - shift).int()  # 0, 1, 2 from top to bottom
    region_x = (x >= W - w).int() + (x >= W - shift).int()
    region = 3 * region_y[:, None] + region_x  # (H, W)
    region = to_windows(region[None, :, :, None], w).squeeze(-1)  # (n, N)
    return (region[:, None, :, None] != region[:, None, None, :]) * -100.0


class PatchMerging(nn.Module):
    """Four neighbours become one token, (B, H, W, d) -> (B, H/2, W/2, 2 d), rounded up."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(self.gather(x)))

    @staticmethod
    def gather(x: Tensor) -> Tensor:
        """(B, H, W, d) -> (B, H/2, W/2, 4 d): top left, bottom left, top right, bottom right."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, col::2] for col in (0, 1) for row in (0, 1)]
        return torch.cat(corners, dim=-1)


class SwinTransformer(Classifier):
    """Images (B, 3, H, W) of any size -> logits (B, num_classes). Blocks are numbered through all
    stages; downsample.{s} stands behind stage s."""

    block, merging = SwinBlock, PatchMerging

    def __init__(self, config: SwinConfig):
        super().__init__()
        stages = len(config.depths)
        self.config, self.num_features = config, config.dim * 2 ** (stages - 1)
        self.patch_embed = PatchEmbed(config, config.dim, any_size=True)
        self.patch_norm = nn.LayerNorm(config.dim)
        absolute = config.absolute_positions
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(config.grid), config.dim)) if absolute else None
        places = [(stage, i) for stage in range(stages) for i in range(config.depths[stage])]
        self.blocks = nn.ModuleList(self.block(config, stage, shifted=i % 2 == 1) for stage, i in places)
        self.downsample = nn.ModuleList(self.merging(config.dim * 2**stage) for stage in range(stages - 1))
        self.norm = nn.LayerNorm(self.num_features, eps=config.eps)
        self.grad_checkpointing = False
        self.head = nn.Identity()
        self.apply(init_weights)
        self.reset_classifier(config.num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H/p, W/p, d), rounded up: zeros complete the last patches."""
        p = self.config.patch_size
        x = F.pad(x, (0, -x.shape[3] % p, 0, -x.shape[2] % p))
        grid = (x.shape[2] // p, x.shape[3] // p)
        x = self.patch_norm(self.patch_embed(x))  # (B, P, d)
        if self.pos_embed is not None:
            if grid != self.config.grid:
                raise ValueError(f"{self.config.name} has positions for {self.config.grid} patches, got {grid}")
            x = x + self.pos_embed
        return x.unflatten(1, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the last stage's tokens after the final norm, (B, T, num_features)."""
        x = self.embed(x)  # (B, H, W, d)
        blocks = iter(self.blocks)
        for stage, depth in enumerate(self.config.depths):
            for _ in range(depth):
                block = next(blocks)
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            if stage < len(self.downsample):
                x = self.downsample[stage](x)
        return self.norm(x.flatten(1, 2))

    def pooled(self, x: Tensor) -> Tensor:
        """The mean of all tokens, (B, num_features)."""
        return self.pool(self.forward_features(x))

    def pool(self, tokens: Tensor) -> Tensor:
        """The mean of (B, T, d) over T."""
        return tokens.mean(1)
