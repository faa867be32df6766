"""CLIP: a vision tower and a causal text tower whose projections meet in one space.

Paper: Radford et al. 2021, arXiv:2103.00020. Weights of OpenAI (quick_gelu) and of LAION (gelu).
Shapes: B pictures or texts, T tokens, d width of a tower, e width of the shared space.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference_models.layers import (
    Block,
    PatchEmbed,
    PatchGrid,
    collect_attention_maps,
    init_weights,
    run_blocks,
    take_rows,
)
from reference_models.text_layers import CausalBlock, causal_mask, pack_choices, padding_mask

POOLS = ("argmax", "eos", "first", "last")


@dataclass(frozen=True)
class CLIPConfig(PatchGrid):
    """Sizes of both towers. text_pool names the token whose vector a text has: "argmax" the one of
    the largest id, "eos" the first eos_token_id, "first" or "last"; "" is transformers' convention,
    by which eos_token_id 2 means argmax and any other eos. Without text_causal every token of a
    text sees every other one."""

    name: str = "clip-vit-b-32"
    embed_dim: int = 512
    image_size: int = 224
    patch_size: int = 32
    vision_dim: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    vision_hidden: int = 3072
    vision_act: str = "gelu"
    vision_eps: float = 1e-5
    vocab_size: int = 49408
    context: int = 77
    text_dim: int = 512
    text_depth: int = 12
    text_heads: int = 8
    text_hidden: int = 2048
    text_act: str = "gelu"
    text_eps: float = 1e-5
    eos_token_id: int = 2
    text_pool: str = ""
    text_causal: bool = True
    logit_scale: float = 2.6592  # ln(1 / 0.07)
    family: str = "clip"

    @property
    def pooled_at(self) -> str:
        """text_pool, or what it stands for."""
        return self.text_pool or ("argmax" if self.eos_token_id == 2 else "eos")

    @property
    def fill(self) -> int | None:
        """The length to which texts are padded, where padding is seen or pooled; None: any."""
        return None if self.text_causal and self.pooled_at != "last" else self.context


class VisionTower(nn.Module):
    """Pictures (B, 3, H, W) -> pooled (B, d): a ViT with a norm before its blocks and no bias in
    its patches, usable alone as the picture encoder of the other tasks."""

    head_modules = ()

    def __init__(self, config: CLIPConfig):
        super().__init__()
        d = config.vision_dim
        self.config, self.num_features, self.prefix = config, d, 1
        self.patch_embed = PatchEmbed(config, d, bias=False)
        self.cls_token = nn.Parameter(torch.randn(1, 1, d) * d**-0.5)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + math.prod(config.grid), d) * d**-0.5)
        self.norm_pre = nn.LayerNorm(d, eps=config.vision_eps)
        block = (d, config.vision_heads, config.vision_hidden, config.vision_act, config.vision_eps)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(config.vision_depth))
        self.norm = nn.LayerNorm(d, eps=config.vision_eps)
        self.grad_checkpointing, self.pooled_last_block = False, True
        self.apply(init_weights)

    def forward_features(self, x: Tensor, last_rows: int | None = None) -> Tensor:
        """All tokens after the final norm (B, T, d), class token first, or last_rows (B, 1, d)."""
        x = self.patch_embed(x)  # (B, T - 1, d)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1) + self.pos_embed
        x = run_blocks(self.blocks, self.norm_pre(x), checkpointing=self.grad_checkpointing, last_rows=last_rows)
        return self.norm(x)

    def pooled(self, x: Tensor) -> Tensor:
        """The class token, (B, d)."""
        return self.pool(self.forward_features(x, 0 if self.pooled_last_block else None))

    def pool(self, tokens: Tensor) -> Tensor:
        """The class token of (B, T, d)."""
        return tokens[:, 0]

    forward = pooled

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """One (B, heads, T, T) tensor for each layer; every row sums to 1."""
        return collect_attention_maps(self, lambda: self.forward_features(x))


class TextTower(nn.Module):
    """Token ids (B, T) -> pooled (B, d), the token at the end of each text; a token sees only those
    before it. A tower that pools or sees padding wants texts of config.fill tokens."""

    head_modules = ()

    def __init__(self, config: CLIPConfig):
        super().__init__()
        d = config.text_dim
        self.config, self.num_features = config, d
        self.token_embed = nn.Embedding(config.vocab_size, d)
        self.pos_embed = nn.Parameter(torch.randn(1, config.context, d) * 0.01)
        block = (d, config.text_heads, config.text_hidden, config.text_act, config.text_eps)
        kind = CausalBlock if config.text_causal else Block
        self.blocks = nn.ModuleList(kind(*block) for _ in range(config.text_depth))
        if config.pooled_at not in POOLS:
            raise ValueError(f"text_pool {config.text_pool!r} is not known; the choices are {', '.join(POOLS)}")
        self.norm = nn.LayerNorm(d, eps=config.text_eps)
        self.grad_checkpointing, self.pooled_last_block = False, True
        self.apply(init_weights)

    def end_positions(self, input_ids: Tensor) -> Tensor:
        """The token whose vector each text has, (B, T) -> (B,), by config.text_pool."""
        where = self.config.pooled_at
        if where in ("first", "last"):
            return input_ids.new_full(input_ids.shape[:-1], 0 if where == "first" else input_ids.shape[-1] - 1)
        ends = input_ids if where == "argmax" else (input_ids == self.config.eos_token_id).int()
        return ends.argmax(dim=-1)

    def forward_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, last_rows: Tensor | None = None
    ) -> Tensor:
        """All tokens after the final norm, (B, T, d), or (B, 1, d) with one of last_rows (B,) for
        each text. attention_mask (B, T) may be left out where padding stands behind the end token:
        nothing before sees it."""
        T = input_ids.shape[1]
        if T > self.config.context:
            raise ValueError(f"{T} tokens, but {self.config.name} has positions for {self.config.context}")
        x = self.token_embed(input_ids) + self.pos_embed[:, :T]  # (B, T, d)
        seen, checkpointing = padding_mask(attention_mask), self.grad_checkpointing  # (B, 1, 1, T)
        if seen is not None and self.config.text_causal:
            allowed = causal_mask(T, None, x.device) & seen  # (B, 1, T, T)
            return self.run(x, allowed[:, 0], last_rows)
        return self.norm(run_blocks(self.blocks, x, seen, checkpointing=checkpointing, last_rows=last_rows))

    def run(self, x: Tensor, allowed: Tensor, last_rows: Tensor | None) -> Tensor:
        """All blocks, where query i may look at token j if allowed[:, i, j], and the final norm;
        the last block for last_rows (B,) or (B, n) only. x (B, T, d), allowed (B, T, T) ->
        (B, T, d) or (B, n, d). The mask is made once: torch would convert a bool one each time."""
        mask = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill_(~allowed, float("-inf"))
        x = run_blocks(self.blocks[:-1], x, mask[:, None], checkpointing=self.grad_checkpointing)
        mask = take_rows(mask, last_rows)[:, None]  # (B, 1, T, T), (B, 1, 1, T) or (B, 1, n, T)
        return self.norm(self.blocks[-1](x, mask, rows=last_rows))

    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The end token, (B, d). token_type_ids is BERT's and has no meaning here."""
        ends = self.end_positions(input_ids)
        if self.pooled_last_block:
            return self.forward_features(input_ids, attention_mask, ends)[:, 0]
        return self.forward_features(input_ids, attention_mask)[torch.arange(len(ends), device=ends.device), ends]

    forward = pooled

    def pooled_choices(self, input_ids: Tensor, length: int | None = None) -> Tensor:
        """Texts (B, C, T) of C choices for each question -> their end tokens (B, C, d), as `pooled`
        of each text; for a causal tower. The common beginning of a question's texts is computed
        once, and in the last block only the end tokens. length: see pack_choices."""
        packed = pack_choices(input_ids, self.end_positions(input_ids), length)
        x = self.token_embed(packed.ids) + self.pos_embed[0, packed.positions]  # (B, L, d)
        return self.run(x, packed.mask, packed.ends)

    def attention_maps(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """One (B, heads, T, T) tensor for each layer; every row sums to 1."""
        return collect_attention_maps(self, lambda: self.forward_features(input_ids, attention_mask))


class CLIP(nn.Module):
    """Pictures (B, 3, H, W) and texts (C, T) -> (logits_per_image (B, C), logits_per_text (C, B)):
    exp(logit_scale) * cosine of each picture with each text, + logit_bias where there is one."""

    head_modules = ("visual_projection", "text_projection", "logit_scale")

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config, self.num_features = config, config.embed_dim
        self.vision, self.text = VisionTower(config), TextTower(config)
        self.visual_projection = nn.Linear(config.vision_dim, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text_dim, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale))  # a logarithm
        self.logit_bias = None  # SigLIP's

    def pooled_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, d) before the projection. Padding stands behind the end token, where nobody
        sees it, or counts as text: the mask has no effect and is left out, which is faster."""
        return self.text.pooled(input_ids)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, e), not normalised."""
        return self.visual_projection(self.vision.pooled(images))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, e), not normalised."""
        return self.text_projection(self.text.pooled(input_ids, attention_mask))

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), texts (C, T) -> logits (B, C), and the same transposed (C, B)."""
        image = F.normalize(self.encode_image(images), dim=-1)  # (B, e)
        text = F.normalize(self.encode_text(input_ids, attention_mask), dim=-1)  # (C, e)
        logits = self.logit_scale.exp() * image @ text.T  # (B, C)
        logits = logits if self.logit_bias is None else logits + self.logit_bias
        return logits, logits.T

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """The maps of the vision tower, one (B, heads, T, T) tensor for each layer."""
        return self.vision.attention_maps(images)
