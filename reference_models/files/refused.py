"""Architectures that people bring and that no model here computes: why not, and what to take."""

import re

DINOV2 = "DINOv2 (facebook/dinov2-base, timm's vit_base_patch14_reg4_dinov2)"
CLIP = "CLIP's picture tower (timm's vit_base_patch16_clip_224) or SigLIP's"
VIT = "a plain ViT of that size (vit_base_patch16_224, deit3_base_patch16_224)"
REFUSED = (  # pattern in model_type or architecture, what differs, what to take instead
    (r"dinov3|lingbot|sapiens", "positions by rotation (DINOv3)", DINOV2),
    (r"swinv2_cr", "other blocks than Microsoft's Swin V2", "swinv2_base_window8_256"),
    (r"^eva|rope|_pe_(core|lang|spatial)|mvitv2", "positions by rotation, or EVA's own blocks", CLIP),
    (r"s?relpos|_rpn", "relative positions outside BEiT's", "BEiT (beit_base_patch16_224) or Swin"),
    (r"(^|_)sam|^samvit|vitdet", "windows and an encoder for masks, no classifier", DINOV2),
    (r"vitamin|hybrid|_r\d*_|_resnet|_mci", "a convolutional stem (hybrid)", VIT),
    (r"convnext", "convolutions", "Swin (swin_tiny_patch4_window7_224) or mobilenet-v2"),
    (r"resnet|resnext|efficientnet|regnet|mobilenet|densenet|vgg", "convolutions", "mobilenet-v2, " + VIT),
    (r"beit3|_xp_|_d?l?pwee|_d?wee|_dpwee|_dlittle|x2_", "other norms, parallel branches or another attention", VIT),
)


def instead(kind: str) -> str:
    """What a refusal says of a model_type or architecture; "" where nothing is known of it."""
    for pattern, why, take in REFUSED:
        if re.search(pattern, kind.lower().replace("-", "_")):
            return f"it has {why}, which no model here has; take {take}"
    return ""
