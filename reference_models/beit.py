"""BEiT: a ViT whose attention knows how far apart two patches are, with a gain on each branch.

    scores = q k^T / sqrt(d/h) + bias[offset of the two patches]   one learned per offset and head
    x = x + gamma_1 * attn(norm1(x));  x = x + gamma_2 * mlp(norm2(x))

The keys have no bias, and the classifier reads the mean of the patch tokens (or the class token).
Paper: Bao et al. 2021, arXiv:2106.08254. Layer scale: Touvron et al. 2021, arXiv:2103.17239.
Shapes: B pictures, P = r c patches in r rows and c columns, T = P + 1 tokens (class token first),
d width, h heads.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference_models.layers import Block, Classifier, PatchEmbed, PatchGrid, init_weights, run_blocks, take_rows


@dataclass(frozen=True)
class BeitConfig(PatchGrid):
    """Sizes of a BEiT. image_size is a side in pixels, or (height, width)."""

    name: str = "beit-base-patch16-224"
    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    num_classes: int = 1000
    eps: float = 1e-6
    act: str = "gelu"
    qkv_bias: bool = True
    relative_bias: bool = True  # a table in each layer
    shared_relative_bias: bool = False  # one table for all layers
    absolute_positions: bool = False
    layer_scale: float = 0.1  # the first value of gamma, 0 for none
    mean_pooling: bool = True  # False: the class token
    family: str = "beit"


def relative_index(height: int, width: int) -> Tensor:
    """Row of a position-bias table for any two places of a window, (height width, height width);
    its rows are the (2 height - 1)(2 width - 1) offsets (dy, dx), by dy, then dx."""
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    dy, dx = y[:, None] - y + height - 1, x[:, None] - x + width - 1  # from 0 up
    return dy * (2 * width - 1) + dx


class RelativePositionBias(nn.Module):
    """What is added to the attention scores: table[offset from key to query], () -> (1, h, T, T);
    table ((2 r - 1)(2 c - 1) + 3, h): a row for each offset of two patches, then class token to
    patch, patch to class token, class token to itself."""

    def __init__(self, grid: tuple[int, int], heads: int):
        super().__init__()
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.table = nn.Parameter(torch.zeros(offsets + 3, heads))
        index = torch.empty(1 + grid[0] * grid[1], 1 + grid[0] * grid[1], dtype=torch.long)
        index[1:, 1:] = relative_index(*grid)
        index[0, :], index[:, 0] = offsets, offsets + 1
        index[0, 0] = offsets + 2
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Tensor:
        return self.table.T[:, self.index].unsqueeze(0)


class ScaledBlock(Block):
    """A pre-norm block with layer scale, unless config.layer_scale, where the gains begin, is 0:
    x = x + gamma_1 * attn(norm1(x)); x = x + gamma_2 * mlp(norm2(x)), (B, T, d) -> (B, T, d)."""

    def __init__(self, config):
        super().__init__(config.dim, config.heads, config.hidden, config.act, config.eps, config.qkv_bias)
        scale = config.layer_scale
        self.gamma_1 = nn.Parameter(torch.full((config.dim,), float(scale))) if scale else None
        self.gamma_2 = nn.Parameter(torch.full((config.dim,), float(scale))) if scale else None

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: Tensor | int | None = None) -> Tensor:
        if self.gamma_1 is None:
            return super().forward(x, mask, rows)
        x = take_rows(x, rows) + self.gamma_1 * self.attn(self.norm1(x), mask, rows)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class BeitBlock(ScaledBlock):
    """Its scores have a position bias: its own, `shared` (1, h, T, T) with all blocks, or both."""

    def __init__(self, config: BeitConfig):
        super().__init__(config)
        self.rel_pos_bias = RelativePositionBias(config.grid, config.heads) if config.relative_bias else None

    def attention(self, dim: int, heads: int, qkv_bias: bool) -> nn.Module:
        return super().attention(dim, heads, qkv_bias, key_bias=False)

    def forward(self, x: Tensor, shared: Tensor | None = None, rows: int | None = None) -> Tensor:
        own = None if self.rel_pos_bias is None else self.rel_pos_bias()  # (1, h, T, T)
        bias = own if shared is None else shared if own is None else shared + own
        return super().forward(x, bias, rows)


class Beit(Classifier):
    """Images (B, 3, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: BeitConfig):
        super().__init__()
        self.config, self.num_features, self.prefix = config, config.dim, 1
        self.patch_embed = PatchEmbed(config, config.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        absolute = config.absolute_positions
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(config.grid), config.dim)) if absolute else None
        shared = config.shared_relative_bias
        self.rel_pos_bias = RelativePositionBias(config.grid, config.heads) if shared else None
        self.blocks = nn.ModuleList(BeitBlock(config) for _ in range(config.depth))
        # after mean pooling the norm stands behind the mean, else before the class token is taken
        self.norm = None if config.mean_pooling else nn.LayerNorm(config.dim, eps=config.eps)
        self.fc_norm = nn.LayerNorm(config.dim, eps=config.eps) if config.mean_pooling else None
        self.grad_checkpointing, self.pooled_last_block = False, True
        self.head = nn.Identity()
        self.apply(init_weights)
        self.reset_classifier(config.num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> tokens (B, T, d)."""
        x = self.patch_embed(x)  # (B, P, d)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        return x if self.pos_embed is None else x + self.pos_embed

    def forward_features(self, x: Tensor, last_rows: int | None = None) -> Tensor:
        """All tokens, normed where the class token is read: (B, T, d), or last_rows (B, 1, d)."""
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()  # (1, h, T, T)
        x = run_blocks(self.blocks, self.embed(x), shared, checkpointing=self.grad_checkpointing, last_rows=last_rows)
        return x if self.norm is None else self.norm(x)

    def pooled(self, x: Tensor) -> Tensor:
        """The normalised mean of the patch tokens, or the class token, (B, d)."""
        alone = self.fc_norm is None and self.pooled_last_block
        return self.pool(self.forward_features(x, last_rows=0 if alone else None))

    def pool(self, tokens: Tensor) -> Tensor:
        """The same of all tokens (B, T, d)."""
        return tokens[:, 0] if self.fc_norm is None else self.fc_norm(tokens[:, 1:].mean(1))
