"""The two-tower models; only this library writes such files. See load.py for the protocol."""

from dataclasses import replace

from torch import nn

from reference_models.files import bert, mobilenet, vit
from reference_models.fusion import FusionConfig, TwoTower

# picture tower, text tower, fusion: the two reports' models, and one that runs anywhere
PAIRS = {
    "vqa-nano": (vit.config_for("vit-nano-patch8-48"), "bert-nano", "concat"),
    # R1's ViT has the pooler of transformers' ViTModel
    "vqa-vit-bert": (replace(vit.config_for("vit-base-patch16-224"), pooler=True), "bert-base", "concat"),
    "vqa-mobilenet-bert": (mobilenet.config_for("mobilenet-v2"), "bert-base", "product"),
}
MODELS = {
    name: FusionConfig(name, replace(vision, num_classes=0), bert.config_for(text), fusion)
    for name, (vision, text, fusion) in PAIRS.items()
}
names, config_for = list(MODELS), MODELS.get


def build(config: FusionConfig, vision: nn.Module, text: nn.Module) -> TwoTower:
    options = {key: getattr(config, key) for key in ("fusion", "hidden", "inner", "dropout", "name")}
    return TwoTower(vision, text, config.num_classes, **options)
