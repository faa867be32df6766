"""Architectures that people bring and that no model here computes: why not, and what to take."""

import re

DINOV2 = "DINOv2 (facebook/dinov2-base, timm's vit_base_patch14_reg4_dinov2)"
CLIP = "CLIP's picture tower (timm's vit_base_patch16_clip_224) or SigLIP's"
VIT = "a plain ViT of that size (vit_base_patch16_224, deit3_base_patch16_224)"
BERT = "RoBERTa (roberta-base) or BERT (bert-base)"
REFUSED = (  # pattern in model_type or architecture, what differs, what to take instead
    (r"dinov3|lingbot|sapiens", "positions by rotation (DINOv3)", DINOV2),
    (r"swinv2_cr", "other blocks than Microsoft's Swin V2", "swinv2_base_window8_256"),
    (r"^eva|rope|_pe_(core|lang|spatial)|mvitv2", "positions by rotation, or EVA's own blocks", CLIP),
    (r"s?relpos|_rpn", "relative positions outside BEiT's", "BEiT (beit_base_patch16_224) or Swin"),
    (r"(^|_)sam|^samvit|vitdet", "windows and an encoder for masks, no classifier", DINOV2),
    (r"vitamin|hybrid|_r\d*_|_resnet|_mci", "a convolutional stem (hybrid)", VIT),
    (r"convnext|fastvit", "convolutions", "Swin (swin_tiny_patch4_window7_224) or mobilenet-v2"),
    (r"resnet|resnext|efficientnet|regnet|mobilenet|densenet|vgg", "convolutions", "mobilenet-v2, " + VIT),
    (r"^coca", "a decoder of captions (CoCa)", "CLIP (clip-vit-b-32)"),
    (
        r"^siglip2(_text_model|_vision_model)?$|naflex",
        "pictures of any number of patches (NaFlex)",
        "a SigLIP 2 of one size (siglip2-base-patch16-224)",
    ),
    (r"modernbert|neobert|nomic_bert", "positions by rotation", BERT),
    (r"electra", "embeddings of a width of their own (ELECTRA)", BERT),
    (r"albert", "one block's weights for all layers", "DistilBERT (distilbert-base)"),
    (r"deberta", "positions inside its attention", BERT),
    (r"mt5|nllb|m2m_100|bart|marian", "a decoder behind its encoder", "XLM-RoBERTa (xlm-roberta-base)"),
    (r"(^|/)u?t5", "a decoder behind its encoder", BERT),
    (r"xlm_roberta_xl|mobilebert|longformer|big_bird|xlnet", "other blocks than BERT's", BERT),
    (r"beit3|_xp_|_d?l?pwee|_d?wee|_dpwee|_dlittle|x2_", "other norms, parallel branches or another attention", VIT),
)


def instead(kind: str) -> str:
    """What a refusal says of a model_type or architecture; "" where nothing is known of it."""
    for pattern, why, take in REFUSED:
        if re.search(pattern, kind.lower().replace("-", "_")):
            return f"it has {why}, which no model here has; take {take}"
    return ""
