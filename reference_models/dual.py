"""A CLIP made of any picture encoder and any text encoder: each keeps its own weights, and two
new projections lead into one space.

    vision, text = load_pretrained("vit-tiny-patch16-224", a), load_pretrained("bert-base", b)
    model = DualEncoder(DualConfig("dual", vision.config, text.config), vision, text)
    logits_per_image, logits_per_text = model(images, input_ids, attention_mask)

logits = exp(logit_scale) * cos(P_v v, P_t t), (B, C)
with v (B, dv), t (C, dt) the towers' vectors and P_v (e, dv), P_t (e, dt) the projections.

Source: LiT, Zhai et al. 2021, arXiv:2111.07991; transformers' VisionTextDualEncoderModel.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from reference_models.clip import CLIP


@dataclass(frozen=True)
class DualConfig:
    """The configurations of both towers and the width e of the shared space; logit_scale is
    where the scale's logarithm begins."""

    name: str = "dual"
    vision: object = None
    text: object = None
    embed_dim: int = 512
    logit_scale: float = 2.6592  # ln(1 / 0.07)
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


class DualEncoder(CLIP):
    """Pictures (B, 3, H, W) and texts (C, T) -> logits per image (B, C) and per text (C, B)."""

    def __init__(self, config: DualConfig, vision: nn.Module, text: nn.Module):
        nn.Module.__init__(self)
        if getattr(vision.config, "num_classes", 0):
            vision.reset_classifier(0)  # nothing trainable outside the loss
        self.config, self.num_features = replace(config, vision=vision.config), config.embed_dim
        self.vision, self.text = vision, text
        self.visual_projection = nn.Linear(vision.num_features, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(text.num_features, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale))  # a logarithm

    def pooled_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, d) before the projection."""
        return self.text.pooled(input_ids, attention_mask)
