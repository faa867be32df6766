"""The files of ViT and DeiT checkpoints. See load.py for the protocol."""

import re
from dataclasses import replace

from reference_models.errors import ModelError
from reference_models.files.fields import ENCODER_FIELDS, NO_DROPOUT, read_fields, size_name, write_fields
from reference_models.files.names import BLOCK, OUTSIDE, PACKED, QKV, Entry, blocks, linear, rows
from reference_models.files.shapes import adapt_positions, classes_in, fit_positions
from reference_models.files.timm import ENCODER_ARGUMENTS, to_timm
from reference_models.files.timm_vit import SIZES as TIMM_SIZES
from reference_models.files.timm_vit import read_timm
from reference_models.vit import VisionTransformer, ViTConfig
from reference_models.vit_variants import VariantConfig

build, adapt = VisionTransformer, adapt_positions
# of weight files, with the prefixes that their names may carry; the first is the table's own
layouts = {"transformers4": ("vit.", "deit."), "transformers5": ("vit.", "deit."), "timm": ("",), "torchvision": ("",)}
adapter_layouts = ("transformers5", "transformers4", "timm", "torchvision")
ignored = r"^decoder\.|^mask_token$|embeddings\.mask_token$"  # of pretraining (MAE, MSN)
optional = r"^(pooler|head|dist_token)"  # our names that a file may lack or have in addition
layout_settings = {"transformers4": {"eps": 1e-12}, "transformers5": {"eps": 1e-12}}
preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize": "squash"}

#             width depth heads hidden
SIZES = {"nano": (128, 4, 4, 512)} | {size: TIMM_SIZES[size] for size in ("tiny", "small", "base", "large")}
names = ["vit-nano-patch8-48", *(f"vit-{size}-patch16-{side}" for size in [*SIZES][1:] for side in (224, 384))]
FIELDS = {**ENCODER_FIELDS, "qkv_bias": ("qkv_bias", True)}
# torchvision's norms are called as open_clip's
TORCHVISION = {"attn.out_proj": "self_attention.out_proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
PARTS = BLOCK | {"torchvision": BLOCK["open_clip"] | TORCHVISION}
ONE = PACKED | {"torchvision": {"self_attention.in_proj_": QKV}}
# outside the blocks
TIMM = {name: name for name in ("patch_embed.proj", "cls_token", "dist_token", "pos_embed", "norm", "head")}
STEM = {"patch_embed.proj": "conv_proj", "cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}


def config_for(name: str) -> ViTConfig | None:
    """vit-{size}-patch{p}-{side}, such as "vit-tiny-patch16-224"."""
    match = re.fullmatch(rf"vit-({'|'.join(SIZES)})-patch(\d+)-(\d+)", name)
    if not match:
        return None
    return ViTConfig(name, int(match[3]), int(match[2]), *SIZES[match[1]])


def key_table(config: ViTConfig, layout: str) -> list[Entry]:
    """Our names beside transformers' 4 and 5, DeiT's with a second token, timm's, torchvision's."""
    if layout.startswith("transformers"):
        base = "deit." if config.distilled else "vit."
        more = {"dist_token": "embeddings.distillation_token", "pooler.dense": "pooler.dense"}
        table = rows("", base, OUTSIDE | more) + linear("head", "classifier")
        place = f"{base}encoder.layer." if layout == "transformers4" else f"{base}layers."
    elif layout == "timm":
        table, place = rows("", "", TIMM), "blocks."
    else:
        table = rows("", "", STEM | {"norm": "encoder.ln", "head": "heads.head"})
        place = "encoder.layers.encoder_layer_"
    return table + blocks(config.depth, place, PARTS[layout], ONE.get(layout))


def fit_config(config: ViTConfig, shapes: dict[str, tuple]) -> ViTConfig:
    """With its classes, second token and picture size."""
    config = replace(config, num_classes=classes_in(shapes), distilled="dist_token" in shapes)
    return fit_positions(config, shapes, prefix=2 if config.distilled else 1)


def config_from_json(data: dict) -> ViTConfig | VariantConfig | None:
    """Of a ViT, DeiT, MAE or MSN of transformers, or any ViT of timm."""
    if "model_type" not in data:
        return read_timm(data)
    teacher = "DeiTForImageClassificationWithTeacher" in (data.get("architectures") or ())
    if data["model_type"] not in ("vit", "deit", "vit_mae", "vit_msn") or teacher:
        return None
    msn = {"eps": ("layer_norm_eps", 1e-6)} if data["model_type"] == "vit_msn" else {}
    values = read_fields(data, FIELDS | msn)
    return ViTConfig(size_name("vit", values), distilled=data["model_type"] == "deit", **values)


def config_to_json(config: ViTConfig, layout: str) -> dict:
    if layout == "timm":
        if config.distilled:
            raise ModelError(f"{config.name}: timm's distilled models have a second head; write it for transformers")
        architecture = config.name if config.name in names[1:] else "vit-base-patch16-224"
        return to_timm(config, architecture.replace("-", "_"), ENCODER_ARGUMENTS, config.dim)
    kind = "deit" if config.distilled else "vit"
    cls = {"vit": "ViT", "deit": "DeiT"}[kind] + ("ForImageClassification" if config.num_classes else "Model")
    return {"architectures": [cls], "model_type": kind, **write_fields(config, FIELDS), **NO_DROPOUT}
