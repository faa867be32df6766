"""Vision transformer (ViT and DeiT): patches -> tokens -> transformer blocks -> classifier.

Paper: Dosovitskiy et al. 2020, arXiv:2010.11929; DeiT: Touvron et al. 2020, arXiv:2012.12877.
Shapes: B pictures, P = (H / p)(W / p) patches, T = P + 1 tokens (class token first), d width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference_models.layers import Block, Classifier, PatchEmbed, PatchGrid, Pooler, init_weights, run_blocks


@dataclass(frozen=True)
class ViTConfig(PatchGrid):
    """Sizes of a ViT. image_size is a side in pixels, or (height, width); num_classes 0 means no
    head; pooler is the tanh layer of transformers' ViTModel, only for two-tower models, which use
    it; distilled is DeiT, with a second prefix token."""

    name: str = "vit-base-patch16-224"
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
    pooler: bool = False
    distilled: bool = False
    family: str = "vit"


class VisionTransformer(Classifier):
    """Images (B, 3, H, W) -> logits (B, num_classes). `pooled_last_block = False` computes all
    tokens to the end."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config, self.num_features = config, config.dim
        self.prefix = 2 if config.distilled else 1
        self.patch_embed = PatchEmbed(config, config.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.prefix + math.prod(config.grid), config.dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        block = (config.dim, config.heads, config.hidden, config.act, config.eps, config.qkv_bias)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.pooler = Pooler(config.dim) if config.pooler else None
        self.head = nn.Identity()
        self.grad_checkpointing, self.pooled_last_block = False, True
        self.apply(init_weights)
        self.reset_classifier(config.num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> tokens with positions (B, T, d)."""
        x = self.patch_embed(x)  # (B, P, d)
        prefix = [self.cls_token] + ([self.dist_token] if self.config.distilled else [])
        tokens = torch.cat([token.expand(x.shape[0], -1, -1).to(x.dtype) for token in prefix] + [x], dim=1)
        return tokens + self.pos_embed  # (B, T, d)

    def encode(self, x: Tensor, last_rows: int | None = None) -> Tensor:
        """Blocks and final norm: (B, T, d), or (B, 1, d) where only one token is wanted."""
        x = run_blocks(self.blocks, self.embed(x), checkpointing=self.grad_checkpointing, last_rows=last_rows)
        return self.norm(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> all tokens after the final norm (B, T, d)."""
        return self.encode(x)

    def pooled(self, x: Tensor) -> Tensor:
        """The class token, (B, d). The last block computes only that one: its other
        tokens would not be read."""
        return self.pool(self.encode(x, last_rows=0 if self.pooled_last_block else None))

    def pool(self, tokens: Tensor) -> Tensor:
        """The class token of (B, T, d), through the pooler where there is one: (B, d)."""
        return tokens[:, 0] if self.pooler is None else self.pooler(tokens[:, 0])
