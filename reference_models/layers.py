"""The layers that every transformer here is made of. A projection is always called, its weight is
never read, so a LoRALinear in its place always takes part.

Shapes: B pictures or sentences, T tokens, d width, h heads, d/h width of a head; P patches of p x p
pixels. `rows`: a classifier reads one token, so the last block is asked for that one alone. None
means all tokens, an int one place for every sample, (B,) or (B, n) places of each sample; keys and
values are those of all tokens, so the result equals the same rows of the full one.

Attention: Vaswani et al. 2017, arXiv:1706.03762. ViT blocks: Dosovitskiy et al. 2020,
arXiv:2010.11929.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from reference_models.activations import ACTIVATIONS
from reference_models.processor import written_out_pays

fused_attention = True  # False: the readable softmax form everywhere


def take_rows(x: Tensor, rows: Tensor | int | None) -> Tensor:
    """The chosen tokens of x (B, T, d): (B, T, d), (B, 1, d) or (B, n, d)."""
    if rows is None:
        return x
    if isinstance(rows, int):
        return x[:, rows : rows + 1]
    samples = torch.arange(x.shape[0], device=x.device)[:, None]  # (B, 1)
    return x[samples, rows.reshape(x.shape[0], -1)]


class Attention(nn.Module):
    """Multi-head attention with separate q, k, v and out projections:
    softmax(q k^T / sqrt(d/h) + mask) v.

    forward(x (B, T, d), mask, rows) -> (B, T, d). mask is added to the scores
    (float, broadcast to (B, h, T, T)) or keeps entries (bool); of a mask for all queries that of an
    int `rows` is taken. `keep_map = True` stores the attention map of the next call.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, key_bias: bool = True):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of the number of heads {heads}")
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=qkv_bias and key_bias)
        self.v_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.out_proj = nn.Linear(dim, dim)
        self.keep_map, self.map = False, None

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: Tensor | int | None = None) -> Tensor:
        # once, not in each of q, k and v; autocast leaves float64 alone and knows no meta device
        if x.dtype == torch.float32 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if mask is not None and isinstance(rows, int) and mask.shape[-2] > 1:
            mask = mask[..., rows : rows + 1, :]  # the one query that is asked for
        q = self.split_heads(self.q_proj(take_rows(x, rows)))  # (B, h, T, d/h), or fewer with rows
        k = self.split_heads(self.k_proj(x))  # (B, h, T, d/h)
        v = self.split_heads(self.v_proj(x))  # (B, h, T, d/h)
        out = self.attend(q, k, v, mask)  # (B, h, T, d/h)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, T, d)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, T, d) -> (B, h, T, d/h)

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether torch's own kernel computes, which keeps no map."""
        return fused_attention and not self.keep_map and not written_out_pays(q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(d/h) + mask) v, fused by torch or written out."""
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        if self.fused(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # (B, h, T, T)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1)
        if self.keep_map:
            self.map = weights.detach()
        return weights @ v


class MLP(nn.Module):
    """fc2(act(fc1(x))), (B, T, d) -> (B, T, hidden) -> (B, T, d)."""

    def __init__(self, dim: int, hidden: int, act: str = "gelu"):
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"activation {act!r} is not known; known are {', '.join(ACTIVATIONS)}")
        self.fc1 = nn.Linear(dim, hidden)
        self.act = ACTIVATIONS[act]()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x = x + attn(norm1(x)); x = x + mlp(norm2(x)), (B, T, d) ->
    (B, T, d). With `rows` everything after the keys and values is computed for those tokens only.
    """

    attention = Attention

    def __init__(self, dim: int, heads: int, hidden: int, act: str = "gelu", eps: float = 1e-6, qkv_bias: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = self.attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, hidden, act)

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: Tensor | int | None = None) -> Tensor:
        x = take_rows(x, rows) + self.attn(self.norm1(x), mask, rows)
        return x + self.mlp(self.norm2(x))


class Pooler(nn.Module):
    """tanh(W t + b) of the first token, (B, d) -> (B, d)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dense = nn.Linear(dim, dim)

    def forward(self, token: Tensor) -> Tensor:
        return torch.tanh(self.dense(token))


class PatchGrid:
    """For a configuration with image_size, a side or (height, width) in pixels, and patch_size."""

    @property
    def grid(self) -> tuple[int, int]:
        """(H // p, W // p), the patches of a picture."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size


class PatchLinear(nn.Linear):
    """The patch projection; a class of its own so that target_modules="all-linear" means
    the layers of the blocks."""


class PatchEmbed(nn.Module):
    """Cut the picture into p x p patches and project each: a convolution with stride p, as one
    matrix product.

    (B, 3, H, W) -> (B, P, d) with P = (H // p) * (W // p); what is left over at the right and
    bottom edge is cut off. ValueError for a picture of another size than the configuration's, whose
    positions it would not have; a Swin, which has none, takes any size.
    """

    def __init__(self, config, dim: int, bias: bool = True, any_size: bool = False):
        super().__init__()
        self.patch_size, self.name = config.patch_size, config.name
        self.grid = None if any_size else config.grid
        self.proj = PatchLinear(3 * self.patch_size**2, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        (B, C, H, W), p = x.shape, self.patch_size
        h, w = H // p, W // p
        if self.grid not in (None, (h, w)):
            size = " x ".join(str(p * side) for side in self.grid)
            raise ValueError(f"{self.name} takes pictures of {size} pixels, got {H} x {W}")
        x = x[:, :, : h * p, : w * p].reshape(B, C, h, p, w, p)
        x = x.permute(0, 2, 4, 1, 3, 5)  # the pixels of a patch in the order of a kernel
        return self.proj(x.reshape(B, h * w, C * p * p))


def run_blocks(blocks: nn.ModuleList, x: Tensor, *arguments, checkpointing: bool = False, last_rows=None) -> Tensor:
    """All blocks in turn; the last one only for `last_rows`. With checkpointing a block's
    activations are recomputed in backward."""
    for i, block in enumerate(blocks):
        rows = last_rows if i == len(blocks) - 1 else None
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, *arguments, rows=rows, use_reentrant=False)
        else:
            x = block(x, *arguments, rows=rows)
    return x


def collect_attention_maps(model: nn.Module, run) -> list[Tensor]:
    """Call `run()` with every Attention below `model` keeping its map; a list of (B, h, T, T), one
    for each layer."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    try:
        for layer in layers:
            layer.keep_map = True
        with torch.no_grad():
            run()
        return [layer.map for layer in layers]
    finally:
        for layer in layers:
            layer.keep_map, layer.map = False, None


def resize_positions(pos: Tensor, new: tuple[int, int], prefix: int, old: tuple[int, int] | None = None) -> Tensor:
    """Bicubic interpolation of position embeddings (1, prefix + h w, d) to another grid; prefix
    tokens stay as they are."""
    side = math.isqrt(pos.shape[1] - prefix)
    height, width = old or (side, side)
    head, grid = pos[:, :prefix], pos[:, prefix:]
    grid = grid.reshape(1, height, width, -1).permute(0, 3, 1, 2)  # (1, d, h, w)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([head, grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos.dtype)], dim=1)


class Classifier(nn.Module):
    """A linear head on `pooled(x)` (B, num_features), shared by the
    encoders that see pictures only."""

    head_modules = ("head",)

    def reset_classifier(self, num_classes: int) -> None:
        """A new, randomly initialised head for `num_classes` classes; 0 removes it."""
        self.config = replace(self.config, num_classes=num_classes)
        first = next(self.parameters())
        like = {"device": first.device, "dtype": first.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()
        init_weights(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, num_classes)."""
        return self.head(self.pooled(x))

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """One (B, heads, T, T) tensor for each layer, of windows one below the other where the
        model has them; every row sums to 1."""
        return collect_attention_maps(self, lambda: self.forward_features(x))


def init_weights(module: nn.Module) -> None:
    """Normal weights with deviation .02 cut at two deviations, zero biases, as
    ViT, BERT and BEiT begin."""
    if isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
