"""Vision transformer (ViT and DeiT): patches -> tokens -> transformer blocks -> classifier.

Paper: Dosovitskiy et al. 2020, arXiv:2010.11929; DeiT: Touvron et al. 2020, arXiv:2012.12877.
Shapes: B pictures, P = (H / p)(W / p) patches, T = P + 1 tokens (class token first), d width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from reference_models.files.names import Entry
from reference_models.layers import Block, PatchEmbed, Pooler, collect_attention_maps, init_weights, run_blocks

#             width depth heads hidden
SIZES = {
    "nano": (128, 4, 4, 512),
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT. image_size is a side in pixels, or (height, width); num_classes
    0 means no head."""

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
    # the tanh layer of transformers' ViTModel; only for two-tower models, which use it
    pooler: bool = False
    distilled: bool = False  # DeiT's second prefix token
    family: str = "vit"

    @property
    def grid(self) -> tuple[int, int]:
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size


class VisionTransformer(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes). `pooled_last_block = False` computes all
    tokens to the end."""

    head_modules = ("head",)
    layouts = ("transformers5", "transformers4", "timm", "torchvision")

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config, self.num_features = config, config.dim
        self.prefix = 2 if config.distilled else 1
        rows, cols = config.grid
        self.patch_embed = PatchEmbed(config.patch_size, config.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.prefix + rows * cols, config.dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        block = (config.dim, config.heads, config.hidden, config.act, config.eps, config.qkv_bias)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.pooler = Pooler(config.dim) if config.pooler else None
        self.head = nn.Identity()
        self.grad_checkpointing, self.pooled_last_block = False, True
        self.apply(init_weights)
        self.reset_classifier(config.num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new, randomly initialised head for `num_classes` classes; 0 removes it."""
        self.config = replace(self.config, num_classes=num_classes)
        like = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()
        init_weights(self.head)

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> tokens with positions (B, T, d)."""
        p, expected = self.config.patch_size, self.config.grid
        if (x.shape[-2] // p, x.shape[-1] // p) != expected:
            size = " x ".join(str(p * side) for side in expected)
            raise ValueError(f"{self.config.name} takes pictures of {size} pixels, got {x.shape[-2]} x {x.shape[-1]}")
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
        """The class token, (B, d). The last block computes only that one: its other tokens
        would not be read."""
        token = self.encode(x, last_rows=0 if self.pooled_last_block else None)[:, 0]
        return token if self.pooler is None else self.pooler(token)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, num_classes)."""
        return self.head(self.pooled(x))

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """One (B, heads, T, T) tensor for each layer; every row sums to 1."""
        return collect_attention_maps(self, lambda: self.forward_features(x))

    def key_table(self, layout: str) -> list[Entry]:
        from reference_models.files.vit import key_table

        return key_table(self.config, layout)
