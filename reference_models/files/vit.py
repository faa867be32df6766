"""The files of ViT and DeiT checkpoints: names, key tables, config.json, preprocessing.
Protocol: see load.py.
"""

import math
import re
from dataclasses import replace

from torch import Tensor

from reference_models.errors import ModelError
from reference_models.files.names import Entry, linear, rename
from reference_models.files.shared import (
    BLOCK,
    ENCODER_ARGUMENTS,
    ENCODER_FIELDS,
    NO_DROPOUT,
    PACKED,
    QKV,
    adapt_positions,
    blocks,
    patches,
    read_fields,
    to_timm,
    write_fields,
)
from reference_models.files.timm_vit import read_timm
from reference_models.vit import VisionTransformer, ViTConfig
from reference_models.vit_variants import VariantConfig

build = VisionTransformer
# of weight files, with the prefixes that their names may carry; the first is the table's own
layouts = {"transformers4": ("vit.", "deit."), "transformers5": ("vit.", "deit."), "timm": ("",), "torchvision": ("",)}
adapter_layouts = ("transformers5", "transformers4", "timm", "torchvision")
ignored = r"^decoder\.|^mask_token$|embeddings\.mask_token$"  # of pretraining (MAE, MSN)
optional = r"^(pooler|head|dist_token)"  # our names that a file may lack or have in addition
layout_settings = {"transformers4": {"eps": 1e-12}, "transformers5": {"eps": 1e-12}}
preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize": "squash"}

#             width depth heads hidden
SIZES = {
    "nano": (128, 4, 4, 512),
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}

FIELDS = {**ENCODER_FIELDS, "qkv_bias": ("qkv_bias", True)}
# torchvision's norms are called as open_clip's
TORCHVISION = {"attn.out_proj": "self_attention.out_proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
PARTS = BLOCK | {"torchvision": BLOCK["open_clip"] | TORCHVISION}
ONE = PACKED | {"torchvision": {"self_attention.in_proj_": QKV}}


def config_for(name: str) -> ViTConfig | None:
    """vit-{size}-patch{p}-{side}, such as "vit-tiny-patch16-224". None where the name is
    of another family."""
    match = re.fullmatch(rf"vit-({'|'.join(SIZES)})-patch(\d+)-(\d+)", name)
    if not match:
        return None
    dim, depth, heads, hidden = SIZES[match[1]]
    sizes = {"dim": dim, "depth": depth, "heads": heads, "hidden": hidden}
    return ViTConfig(name=name, patch_size=int(match[2]), image_size=int(match[3]), **sizes)


def names() -> list[str]:
    large = [f"vit-{size}-patch16-{side}" for size in SIZES if size != "nano" for side in (224, 384)]
    return ["vit-nano-patch8-48", *large]


def key_table(config: ViTConfig, layout: str) -> list[Entry]:
    """Our names beside those of transformers 4 and 5 (DeiT's with a second token), timm
    and torchvision."""
    if layout.startswith("transformers"):
        base = "deit." if config.distilled else "vit."
        table = [*patches(f"{base}embeddings.patch_embeddings.projection"), *linear("head", "classifier")]
        table += [rename("cls_token", f"{base}embeddings.cls_token")]
        table += [rename("pos_embed", f"{base}embeddings.position_embeddings"), *linear("norm", f"{base}layernorm")]
        table += [rename("dist_token", f"{base}embeddings.distillation_token")]
        table += linear("pooler.dense", f"{base}pooler.dense")
        place = f"{base}encoder.layer." if layout == "transformers4" else f"{base}layers."
    elif layout == "timm":
        table = [*patches("patch_embed.proj"), *linear("head", "head"), *linear("norm", "norm")]
        table += [rename(token, token) for token in ("cls_token", "dist_token", "pos_embed")]
        place = "blocks."
    else:
        table = [*patches("conv_proj"), *linear("head", "heads.head"), *linear("norm", "encoder.ln")]
        table += [rename("cls_token", "class_token"), rename("pos_embed", "encoder.pos_embedding")]
        place = "encoder.layers.encoder_layer_"
    return table + blocks(config.depth, place, PARTS[layout], ONE.get(layout))


def fit_config(config: ViTConfig, shapes: dict[str, tuple]) -> ViTConfig:
    """The configuration with what the shapes of a file (our names) say of it: classes, second
    token, picture size."""
    classes = shapes["head.weight"][0] if "head.weight" in shapes else 0
    config = replace(config, num_classes=classes, distilled="dist_token" in shapes)
    rows, cols = config.grid
    patches = shapes["pos_embed"][1] - (2 if config.distilled else 1) if "pos_embed" in shapes else rows * cols
    if patches != rows * cols:
        config = replace(config, image_size=math.isqrt(patches) * config.patch_size)
    return config


def adapt(state: dict[str, Tensor], old: ViTConfig, new: ViTConfig) -> None:
    """Interpolate the position embeddings in `state` from the old picture size to the
    new one, in place."""
    adapt_positions(state, old, new, prefix=2 if new.distilled else 1)


def config_from_json(data: dict) -> ViTConfig | VariantConfig | None:
    """Read transformers' config.json of a ViT, DeiT, MAE or MSN, or timm's of any ViT; None
    where it is of another family."""
    if "model_type" not in data:
        return read_timm(data)
    teacher = "DeiTForImageClassificationWithTeacher" in (data.get("architectures") or ())
    if data["model_type"] not in ("vit", "deit", "vit_mae", "vit_msn") or teacher:
        return None
    msn = {"eps": ("layer_norm_eps", 1e-6)} if data["model_type"] == "vit_msn" else {}
    values = read_fields(data, FIELDS | msn)
    name = f"vit-{values['dim']}-patch{values['patch_size']}-{values['image_size']}"
    return ViTConfig(name=name, distilled=data["model_type"] == "deit", **values)


def config_to_json(config: ViTConfig, layout: str) -> dict:
    """config.json as transformers or timm read it; labels and preprocessing are
    added by the caller."""
    if layout == "timm":
        if config.distilled:
            raise ModelError(f"{config.name}: timm's distilled models have a second head; write it for transformers")
        architecture = config.name if config.name in names()[1:] else "vit-base-patch16-224"
        return to_timm(config, architecture.replace("-", "_"), ENCODER_ARGUMENTS, config.dim)
    kind = "deit" if config.distilled else "vit"
    cls = {"vit": "ViT", "deit": "DeiT"}[kind] + ("ForImageClassification" if config.num_classes else "Model")
    return {"architectures": [cls], "model_type": kind, **write_fields(config, FIELDS), **NO_DROPOUT}
