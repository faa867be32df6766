"""What later models changed in a ViT: DINOv2, DeiT III, CLIP's and SigLIP's picture towers, and
timm's variants are one ViT with options.

    layer scale     x = x + gamma_1 * attn(norm1(x));  x = x + gamma_2 * mlp(norm2(x))
    registers       learned tokens without a picture, beside or in place of the class token
    pre-norm        a norm before the blocks, and then no bias in the patches
    SwiGLU          fc2(silu(gate(x)) * fc1(x)) in place of fc2(gelu(fc1(x)))
    pooling         the class token, the mean of the patches, both, or a query that attends to all

Papers: DINOv2, Oquab et al. 2023, arXiv:2304.07193; registers, Darcet et al. 2023,
arXiv:2309.16588; DeiT III, Touvron et al. 2022, arXiv:2204.07118; layer scale, Touvron et al. 2021,
arXiv:2103.17239; SwiGLU, Shazeer 2020, arXiv:2002.05202; SigLIP, Zhai et al. 2023,
arXiv:2303.15343. Shapes: B pictures, P patches, T = N + P tokens, of which N without a picture come
first, d width.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference_models.beit import ScaledBlock
from reference_models.layers import MLP, Attention, Classifier, PatchEmbed, init_weights, run_blocks
from reference_models.vit import ViTConfig


@dataclass(frozen=True)
class VariantConfig(ViTConfig):
    """A ViT's sizes and its options. layer_scale is the first value of gamma, 0 for none; registers
    how many; prefix_positions how many of the tokens before the patches have a position. pool names
    the steps from the tokens to one vector: "norm token" is the final norm, then the class token;
    "avg norm" the mean of the patches, then the norm; "token+avg" both side by side, "pair" DeiT's
    two tokens, "map" attention pooling. head_pool are the steps where there is a head, "" for the
    same. distilled_classes are those of DeiT's two heads: another number of classes gets one new
    head. The patches have a bias without a norm before the blocks, unless patch_bias is False."""

    layer_scale: float = 0.0
    registers: int = 0
    class_token: bool = True
    prefix_positions: int = 1
    pre_norm: bool = False
    patch_bias: bool = True
    swiglu: bool = False
    pool: str = "norm token"
    head_pool: str = ""
    distilled_classes: int = 0
    family: str = "vit_variants"

    @property
    def prefix(self) -> int:
        """N, the tokens before the patches."""
        return self.class_token + self.distilled + self.registers

    @property
    def steps(self) -> list[str]:
        """The pooling of this model, with or without its head."""
        if self.distilled_classes and self.distilled_classes == self.num_classes:
            return ["norm", "pair"]
        return (self.num_classes and self.head_pool or self.pool).split()


class SwiGLU(nn.Module):
    """fc2(silu(gate_proj(x)) * fc1(x)), (B, T, d) -> (B, T, hidden) -> (B, T, d)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj, self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.gate_proj(x)) * self.fc1(x))


class VariantBlock(ScaledBlock):
    """A transformer block that may have layer scale and SwiGLU, (B, T, d) -> (B, T, d)."""

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        if config.swiglu:
            self.mlp = SwiGLU(config.dim, config.hidden)


class AttentionPool(Attention):
    """A learned query attends to all tokens, then a residual MLP: (B, T, d) -> (B, d)."""

    def __init__(self, config: VariantConfig):
        super().__init__(config.dim, config.heads)
        self.probe = nn.Parameter(torch.randn(1, 1, config.dim) * config.dim**-0.5)
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = MLP(config.dim, config.hidden, config.act)

    def forward(self, x: Tensor) -> Tensor:
        q = self.split_heads(self.q_proj(self.probe.expand(x.shape[0], -1, -1)))  # (B, h, 1, d/h)
        out = self.attend(q, self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x)), None)
        out = self.out_proj(out.transpose(1, 2).flatten(2))[:, 0]  # (B, d)
        return out + self.mlp(self.norm(out))


class TwoHeads(nn.Module):
    """The mean of DeiT's two classifiers, [class, distillation] token (B, 2 d) -> (B, classes)."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.token, self.dist = nn.Linear(dim, classes), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        token, dist = x.chunk(2, dim=-1)
        return (self.token(token) + self.dist(dist)) / 2


class VariantViT(Classifier):
    """Images (B, 3, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: VariantConfig):
        super().__init__()
        self.config, self.prefix, d = config, config.prefix, config.dim
        self.patch_embed = PatchEmbed(config, d, bias=config.patch_bias and not config.pre_norm)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d)) if config.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, d)) if config.distilled else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, d)) if config.registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.prefix_positions + math.prod(config.grid), d))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.norm_pre = nn.LayerNorm(d, eps=config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(VariantBlock(config) for _ in range(config.depth))
        steps = config.steps
        if unknown := {*steps} - {"norm", "token", "avg", "token+avg", "map", "pair"}:
            raise ValueError(f"pooling {unknown.pop()!r} is not known")
        self.norm = nn.LayerNorm(d, eps=config.eps) if steps[0] == "norm" else None
        self.attn_pool = AttentionPool(config) if "map" in steps else None
        self.fc_norm = nn.LayerNorm(d, eps=config.eps) if "norm" in steps[1:] else None
        self.grad_checkpointing, self.pooled_last_block = False, True
        self.apply(init_weights)
        self.reset_classifier(config.num_classes, config.distilled_classes)

    @property
    def num_features(self) -> int:
        """What `pooled` returns: d, or 2 d of two vectors side by side."""
        return self.config.dim * (2 if {"token+avg", "pair"} & {*self.config.steps} else 1)

    def reset_classifier(self, num_classes: int, distilled_classes: int = 0) -> None:
        """A new, randomly initialised head; what its pooling does not need goes, and where a
        tower without head lacks what its own pooling needs, that of the head stays."""
        config = replace(self.config, num_classes=num_classes, distilled_classes=distilled_classes)
        parts = {"norm": self.norm or self.fc_norm, "map": self.attn_pool}
        if any(parts.get(step, self) is None for step in config.steps):
            config = replace(config, pool=config.head_pool)
        self.config = config
        self.norm = self.norm if config.steps[0] == "norm" else None
        self.attn_pool = self.attn_pool if "map" in config.steps else None
        super().reset_classifier(num_classes)
        if "pair" in config.steps:
            self.head = TwoHeads(config.dim, num_classes).to(self.head.weight)
            self.head.apply(init_weights)

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> tokens with positions (B, T, d)."""
        x, n = self.patch_embed(x), self.config.prefix_positions  # (B, P, d)
        pos = self.pos_embed
        tokens = [token for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        x = x + pos[:, n:]
        if tokens:
            prefix = torch.cat(tokens, dim=1)  # (1, N, d)
            prefix = torch.cat([prefix[:, :n] + pos[:, :n], prefix[:, n:]], dim=1)
            x = torch.cat([prefix.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)  # (B, T, d)
        return self.norm_pre(x)

    def forward_features(self, x: Tensor, last_rows: int | None = None) -> Tensor:
        """All tokens, normed where pooling does not do it: (B, T, d), or last_rows (B, 1, d)."""
        x = run_blocks(self.blocks, self.embed(x), checkpointing=self.grad_checkpointing, last_rows=last_rows)
        return self.norm(x) if self.config.steps[0] == "norm" else x

    def pooled(self, x: Tensor) -> Tensor:
        """One vector for each picture, (B, num_features); of the last block only what it reads."""
        alone = self.pooled_last_block and "token" in self.config.steps
        return self.pool(self.forward_features(x, last_rows=0 if alone else None))

    def pool(self, tokens: Tensor) -> Tensor:
        """The same of all tokens (B, T, d)."""
        x, patches = tokens, tokens[:, self.config.prefix :]
        for step in self.config.steps[self.config.steps[0] == "norm" :]:
            if step == "norm":
                x = self.fc_norm(x)
            elif step == "map":
                x = self.attn_pool(patches)
            elif step == "pair":
                x = tokens[:, :2].flatten(1)
            elif step == "token+avg":
                x = torch.cat([tokens[:, 0], patches.mean(1)], dim=-1)
            else:
                x = tokens[:, 0] if step == "token" else patches.mean(1)
        return x

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """One (B, heads, T, T) tensor for each layer; every row sums to 1. Pooling has no map."""
        return [layer for layer in super().attention_maps(x) if layer is not None]
