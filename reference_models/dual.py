"""A CLIP made of any picture encoder and any text encoder: each keeps its own weights, and two
projections lead into one space. SigLIP is one, and so are open_clip's models with other towers.

    vision, text = load_pretrained("vit-tiny-patch16-224", a), load_pretrained("bert-base", b)
    model = DualEncoder(DualConfig("dual", vision.config, text.config), vision, text)
    logits_per_image, logits_per_text = model(images, input_ids, attention_mask)

logits = exp(logit_scale) * cos(P_v v, P_t t) + logit_bias, (B, C)
with v (B, dv), t (C, dt) the towers' vectors and P_v (e, dv), P_t (e, dt) the projections.

Source: LiT, Zhai et al. 2021, arXiv:2111.07991; transformers' VisionTextDualEncoderModel; SigLIP,
Zhai et al. 2023, arXiv:2303.15343, whose loss takes every pair of a picture and a text by itself.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from reference_models.clip import CLIP


@dataclass(frozen=True)
class DualConfig:
    """The configurations of both towers and the width e of the shared space. logit_scale is where
    the scale's logarithm begins, logit_bias where SigLIP's bias does, None for none. vision_proj
    and text_proj are the projections: "linear", "bias" for a linear layer with one, "mlp", or
    "none" where the tower's vector is the answer. text_pad: the id that is padding where no mask
    says so. trunk: the picture tower is timm's inside open_clip."""

    name: str = "dual"
    vision: object = None
    text: object = None
    embed_dim: int = 512
    logit_scale: float = 2.6592  # ln(1 / 0.07)
    logit_bias: float | None = None
    vision_proj: str = "linear"
    text_proj: str = "linear"
    text_pad: int | None = None
    trunk: bool = False
    family: str = "dual"

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def context(self) -> int:
        """The longest text in tokens."""
        return getattr(self.text, "max_positions", None) or self.text.context


def projection(kind: str, dim: int, out: int) -> nn.Module:
    """(B, dim) -> (B, out), by the names of DualConfig; ValueError for another, or other widths."""
    if kind == "mlp":
        hidden = (dim + out) // 2
        return nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, out, bias=False))
    if kind not in ("linear", "bias", "none") or (kind == "none" and dim != out):
        raise ValueError(f"a projection {kind!r} from {dim} to {out} does not exist")
    return nn.Identity() if kind == "none" else nn.Linear(dim, out, bias=kind == "bias")


class DualEncoder(CLIP):
    """Pictures (B, 3, H, W) and texts (C, T) -> logits per image (B, C) and per text (C, B)."""

    def __init__(self, config: DualConfig, vision: nn.Module, text: nn.Module):
        nn.Module.__init__(self)
        if getattr(vision.config, "num_classes", 0):
            vision.reset_classifier(0)  # nothing trainable outside the loss
        self.config, self.num_features = replace(config, vision=vision.config), config.embed_dim
        self.vision, self.text = vision, text
        self.visual_projection = projection(config.vision_proj, vision.num_features, config.embed_dim)
        self.text_projection = projection(config.text_proj, text.num_features, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale))  # a logarithm
        bias = config.logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        has = {name.partition(".")[0] for name, _ in self.named_parameters()}
        self.head_modules = tuple(name for name in (*CLIP.head_modules, "logit_bias") if name in has)

    def pooled_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, d) before the projection."""
        if attention_mask is None and self.config.text_pad is not None:
            attention_mask = (input_ids != self.config.text_pad).long()
        return self.text.pooled(input_ids, attention_mask)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, e), not normalised."""
        return self.text_projection(self.pooled_text(input_ids, attention_mask))
