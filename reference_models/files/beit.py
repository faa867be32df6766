"""The files of BEiT checkpoints. See load.py for the protocol."""

import math
import re
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_models.beit import Beit, BeitConfig
from reference_models.files.fields import ENCODER_FIELDS, NO_DROPOUT, read_fields, size_name, write_fields
from reference_models.files.names import BLOCK, OUTSIDE, PACKED, Entry, blocks, linear, rename, rows
from reference_models.files.shapes import adapt_positions, classes_in, fit_positions
from reference_models.files.timm import ENCODER_ARGUMENTS, timm_name, to_timm, with_timm_arguments

build = Beit
# no adapter in timm's: its BEiT reads qkv.weight instead of calling qkv
layouts = {"transformers4": ("beit.",), "transformers5": ("beit.",), "timm": ("",)}
# the index is computed from the picture's size; the rest belongs to masked-image pretraining
ignored = r"relative_position_index|mask_token$|^lm_head\."
optional = r"^head"
layout_settings = {"transformers4": {"eps": 1e-12}, "transformers5": {"eps": 1e-12}}
preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize": "squash"}

#             width depth heads hidden first gamma
SIZES = {"nano": (128, 4, 4, 512, 0.1), "base": (768, 12, 12, 3072, 0.1), "large": (1024, 24, 16, 4096, 1e-5)}
names = ["beit-nano-patch8-48", *(f"beit-{size}-patch16-{side}" for size in ("base", "large") for side in (224, 384))]

TABLES = {  # of a block's relative positions
    "transformers4": "attention.attention.relative_position_bias.relative_position_bias_table",
    "transformers5": "relative_position_bias.relative_position_bias_table",
    "timm": "attn.relative_position_bias_table",
}
FIELDS = ENCODER_FIELDS | {
    "relative_bias": ("use_relative_position_bias", False),
    "shared_relative_bias": ("use_shared_relative_position_bias", False),
    "absolute_positions": ("use_absolute_position_embeddings", False),
    "layer_scale": ("layer_scale_init_value", 0.1),
    "mean_pooling": ("use_mean_pooling", True),
}
TIMM_ARGUMENTS = ENCODER_ARGUMENTS | {
    "init_values": "layer_scale",
    "use_rel_pos_bias": "relative_bias",
    "use_shared_rel_pos_bias": "shared_relative_bias",
    "use_abs_pos_emb": "absolute_positions",
}


def config_for(name: str) -> BeitConfig | None:
    """beit-{size}-patch{p}-{side}, such as "beit-large-patch16-384"."""
    match = re.fullmatch(rf"beit-({'|'.join(SIZES)})-patch(\d+)-(\d+)", name)
    if not match:
        return None
    *sizes, gamma = SIZES[match[1]]
    return BeitConfig(name, int(match[3]), int(match[2]), *sizes, layer_scale=gamma)


def key_table(config: BeitConfig, layout: str) -> list[Entry]:
    """Our names beside transformers' 4 and 5 and timm's; rows of parts that it lacks do no harm."""
    if layout == "timm":
        same = ("patch_embed.proj", "cls_token", "pos_embed", "norm", "fc_norm", "head")
        table = rows("", "", {name: name for name in same})
        single = {f"attn.{n}_proj.bias": f"attn.{n}_bias" for n in "qv"} | {f"gamma_{n}": f"gamma_{n}" for n in (1, 2)}
    else:
        table = rows("", "beit.", OUTSIDE | {"fc_norm": "pooler.layernorm"}) + linear("head", "classifier")
        single = {f"gamma_{n}": f"lambda_{n}" for n in (1, 2)}
    shared, place = {
        "transformers4": ("beit.encoder.relative_position_bias", "beit.encoder.layer."),
        "transformers5": ("beit.shared_position_bias", "beit.layers."),
        "timm": ("rel_pos_bias", "blocks."),
    }[layout]
    table += [rename("rel_pos_bias.table", f"{shared}.relative_position_bias_table")]
    parts = BLOCK[layout] | single | {"rel_pos_bias.table": TABLES[layout]}
    return table + blocks(config.depth, place, parts, PACKED.get(layout))


def fit_config(config: BeitConfig, shapes: dict[str, tuple]) -> BeitConfig:
    """With its classes, kinds of position, and size."""
    first = [shapes[key] for key in ("rel_pos_bias.table", "blocks.0.rel_pos_bias.table") if key in shapes]
    config = replace(
        config,
        num_classes=classes_in(shapes),
        relative_bias="blocks.0.rel_pos_bias.table" in shapes,
        shared_relative_bias="rel_pos_bias.table" in shapes,
        absolute_positions="pos_embed" in shapes,
        mean_pooling="fc_norm.weight" in shapes or "norm.weight" not in shapes,
        layer_scale=(config.layer_scale or 0.1) if "blocks.0.gamma_1" in shapes else 0.0,
    )
    if not first:
        return fit_positions(config, shapes, prefix=1)
    (offsets, _), (height, width) = first[0], config.grid
    if offsets != (2 * height - 1) * (2 * width - 1) + 3:
        side = (math.isqrt(offsets - 3) + 1) // 2
        config = replace(config, image_size=side * config.patch_size)
    return config


def adapt(state: dict[str, Tensor], old: BeitConfig, new: BeitConfig) -> None:
    """Interpolate position tables in `state` from the old picture size to the new one, in place."""
    for key in state:
        if key.endswith("rel_pos_bias.table") and old.grid != new.grid:
            state[key] = resize_bias_table(state[key], old.grid, new.grid)
    adapt_positions(state, old, new)


def resize_bias_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of a bias table between patch grids, as transformers does; the three
    rows of the class token stay. ((2 r - 1)(2 c - 1) + 3, h) -> the same for the new r and c."""
    offsets = table[:-3].reshape(1, 2 * old[0] - 1, 2 * old[1] - 1, -1).permute(0, 3, 1, 2)
    size = (2 * new[0] - 1, 2 * new[1] - 1)
    offsets = F.interpolate(offsets.float(), size=size, mode="bilinear", align_corners=False)
    offsets = offsets.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)
    return torch.cat([offsets, table[-3:]])


def config_from_json(data: dict) -> BeitConfig | None:
    if "model_type" not in data:
        config = config_for(re.sub("^beitv2-", "beit-", timm_name(data)))
        return with_timm_arguments(config, data, TIMM_ARGUMENTS, (("global_pool", "avg"), ("global_pool", "token")))
    if data["model_type"] != "beit":
        return None
    values = read_fields(data, FIELDS)
    return BeitConfig(size_name("beit", values), **values)


def config_to_json(config: BeitConfig, layout: str) -> dict:
    if layout == "timm":
        size = "large" if "large" in config.name else "base"
        architecture = f"beit_{size}_patch16_{384 if config.image_size == 384 else 224}"
        data = to_timm(config, architecture, TIMM_ARGUMENTS, config.dim)
        data["model_args"] |= {
            "init_values": config.layer_scale or None,
            "global_pool": "avg" if config.mean_pooling else "token",
        }
        return data
    cls = "BeitForImageClassification" if config.num_classes else "BeitModel"
    fields = write_fields(config, FIELDS)
    return {"architectures": [cls], "model_type": "beit", **fields, **NO_DROPOUT, "drop_path_rate": 0.0}
