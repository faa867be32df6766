"""Names and sizes of the two-tower models; only this library writes such files. See
load.py for the protocol.
"""

from dataclasses import replace

from torch import nn

from reference_models.files import bert, mobilenet, vit
from reference_models.fusion import FusionConfig, TwoTower

#             picture tower, text tower, fusion: the two reports' models, and one that runs anywhere
PAIRS = {
    "vqa-nano": ("vit-nano-patch8-48", "bert-nano", "concat"),
    "vqa-vit-bert": ("vit-base-patch16-224", "bert-base", "concat"),
    "vqa-mobilenet-bert": ("mobilenet-v2", "bert-base", "product"),
}


def build(config: FusionConfig, vision: nn.Module, text: nn.Module) -> TwoTower:
    """The towers, of CLIP the one that is meant, and a head on both."""
    vision, text = getattr(vision, "vision", vision), getattr(text, "text", text)
    options = {key: getattr(config, key) for key in ("fusion", "hidden", "inner", "dropout", "name")}
    return TwoTower(vision, text, config.num_classes, **options)


def names() -> list[str]:
    return list(PAIRS)


def config_for(name: str) -> FusionConfig | None:
    """One of `names()`; R1's ViT has the pooler of transformers' ViTModel."""
    if name not in PAIRS:
        return None
    vision, text, fusion = PAIRS[name]
    vision = replace(vit.config_for(vision) or mobilenet.config_for(vision), num_classes=0)
    if name == "vqa-vit-bert":
        vision = replace(vision, pooler=True)
    return FusionConfig(name, vision, bert.config_for(text), fusion)
