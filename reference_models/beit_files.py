"""The files of BEiT checkpoints: names, key tables, config.json, preprocessing. See load.py for the protocol."""

import math
import re
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_models.beit import Beit, BeitConfig
from reference_models.layers import resize_positions
from reference_models.names import Entry, fused, linear, rename

build = Beit
layouts = {"transformers4": ("beit.",), "transformers5": ("beit.",), "timm": ("",)}
# the index is computed from the picture's size; the rest belongs to masked-image pretraining
ignored = r"relative_position_index|mask_token$|^lm_head\."
optional = r"^head"
layout_settings = {"transformers4": {"eps": 1e-12}, "transformers5": {"eps": 1e-12}}
preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize": "squash"}

#             width depth heads hidden first gamma
SIZES = {
    "nano": (128, 4, 4, 512, 0.1),
    "base": (768, 12, 12, 3072, 0.1),
    "large": (1024, 24, 16, 4096, 1e-5),
}

PARTS = {  # of a block; q and k stand apart because a key has no bias
    "transformers4": {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.q_proj": "attention.attention.query",
        "attn.k_proj": "attention.attention.key",
        "attn.v_proj": "attention.attention.value",
        "attn.out_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "gamma_": "lambda_",
        "rel_pos_bias.table": "attention.attention.relative_position_bias.relative_position_bias_table",
    },
    "transformers5": {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.q_proj": "attention.q_proj",
        "attn.k_proj": "attention.k_proj",
        "attn.v_proj": "attention.v_proj",
        "attn.out_proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "gamma_": "lambda_",
        "rel_pos_bias.table": "relative_position_bias.relative_position_bias_table",
    },
    "timm": {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.out_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "gamma_": "gamma_",
        "rel_pos_bias.table": "attn.relative_position_bias_table",
    },
}


def config_for(name: str) -> BeitConfig | None:
    """beit-{size}-patch{p}-{side}, such as "beit-large-patch16-384". None where the name is of another family."""
    match = re.fullmatch(rf"beit-({'|'.join(SIZES)})-patch(\d+)-(\d+)", name)
    if not match:
        return None
    dim, depth, heads, hidden, gamma = SIZES[match[1]]
    sizes = {"dim": dim, "depth": depth, "heads": heads, "hidden": hidden, "layer_scale": gamma}
    return BeitConfig(name=name, patch_size=int(match[2]), image_size=int(match[3]), **sizes)


def names() -> list[str]:
    large = [f"beit-{size}-patch16-{side}" for size in ("base", "large") for side in (224, 384)]
    return ["beit-nano-patch8-48", *large]


def file_preprocess(file_name: str) -> dict:
    return {}


def key_table(config: BeitConfig, layout: str) -> list[Entry]:
    """Our names beside those of transformers 4 and 5 and timm; rows of parts that a configuration lacks do no
    harm.
    """
    timm = layout == "timm"
    patch = "patch_embed.proj" if timm else "beit.embeddings.patch_embeddings.projection"
    outside = "" if timm else "beit.embeddings."
    table = [rename("patch_embed.proj.weight", f"{patch}.weight", "kernel")]
    table += [rename("patch_embed.proj.bias", f"{patch}.bias")]
    table += [rename("cls_token", f"{outside}cls_token")]
    table += [rename("pos_embed", "pos_embed" if timm else f"{outside}position_embeddings")]
    table += linear("norm", "norm" if timm else "beit.layernorm")
    table += linear("fc_norm", "fc_norm" if timm else "beit.pooler.layernorm")
    table += linear("head", "head" if timm else "classifier")
    shared, blocks = {
        "transformers4": ("beit.encoder.relative_position_bias", "beit.encoder.layer"),
        "transformers5": ("beit.shared_position_bias", "beit.layers"),
        "timm": ("rel_pos_bias", "blocks"),
    }[layout]
    table += [rename("rel_pos_bias.table", f"{shared}.relative_position_bias_table")]
    for i in range(config.depth):
        table += _block(f"blocks.{i}", f"{blocks}.{i}", layout)
    return table


def _block(ours: str, theirs: str, layout: str) -> list[Entry]:
    table = []
    for part, name in PARTS[layout].items():
        if part == "gamma_":
            table += [rename(f"{ours}.gamma_{n}", f"{theirs}.{name}{n}") for n in (1, 2)]
        elif part.endswith("table"):
            table += [rename(f"{ours}.{part}", f"{theirs}.{name}")]
        else:
            table += linear(f"{ours}.{part}", f"{theirs}.{name}", bias=not part.endswith("k_proj"))
    if layout == "timm":
        table += fused([f"{ours}.attn.{name}_proj" for name in "qkv"], f"{theirs}.attn.qkv.weight")
        table += [rename(f"{ours}.attn.{n}_proj.bias", f"{theirs}.attn.{n}_bias") for n in "qv"]
    return table


def fit_config(config: BeitConfig, shapes: dict[str, tuple]) -> BeitConfig:
    """The configuration with what a file's names and shapes (ours) say of it: classes, kinds of position, size."""
    first = [shapes[key] for key in ("rel_pos_bias.table", "blocks.0.rel_pos_bias.table") if key in shapes]
    config = replace(
        config,
        num_classes=shapes["head.weight"][0] if "head.weight" in shapes else 0,
        relative_bias="blocks.0.rel_pos_bias.table" in shapes,
        shared_relative_bias="rel_pos_bias.table" in shapes,
        absolute_positions="pos_embed" in shapes,
        mean_pooling="fc_norm.weight" in shapes or "norm.weight" not in shapes,
        layer_scale=(config.layer_scale or 0.1) if "blocks.0.gamma_1" in shapes else 0.0,
    )
    rows, cols = config.grid
    side = None
    if first and first[0][0] != (2 * rows - 1) * (2 * cols - 1) + 3:
        side = (math.isqrt(first[0][0] - 3) + 1) // 2
    elif not first and "pos_embed" in shapes and shapes["pos_embed"][1] != 1 + rows * cols:
        side = math.isqrt(shapes["pos_embed"][1] - 1)
    return config if side is None else replace(config, image_size=side * config.patch_size)


def adapt(state: dict[str, Tensor], old: BeitConfig, new: BeitConfig) -> None:
    """Interpolate position tables in `state` from the old picture size to the new one, in place."""
    if old.grid == new.grid:
        return
    for key in state:
        if key.endswith("rel_pos_bias.table"):
            state[key] = resize_bias_table(state[key], old.grid, new.grid)
    if "pos_embed" in state:
        state["pos_embed"] = resize_positions(state["pos_embed"], new.grid, 1, old.grid)


def resize_bias_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of a bias table between patch grids, as transformers does; the three rows of the
    class token stay. ((2 r - 1)(2 c - 1) + 3, h) -> the same for the new r and c.
    """
    offsets = table[:-3].reshape(1, 2 * old[0] - 1, 2 * old[1] - 1, -1).permute(0, 3, 1, 2)
    size = (2 * new[0] - 1, 2 * new[1] - 1)
    offsets = F.interpolate(offsets.float(), size=size, mode="bilinear", align_corners=False)
    offsets = offsets.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)
    return torch.cat([offsets, table[-3:]])


def config_from_json(data: dict) -> BeitConfig | None:
    """Read transformers' or timm's config.json; None where it is of another family."""
    if "model_type" not in data:
        return _from_timm(data)
    if data["model_type"] != "beit":
        return None
    side, patch = data.get("image_size", 224), data.get("patch_size", 16)
    return BeitConfig(
        name=f"beit-{data.get('hidden_size', 768)}-patch{patch}-{side}",
        image_size=side if isinstance(side, int) else tuple(side),
        patch_size=patch,
        dim=data.get("hidden_size", 768),
        depth=data.get("num_hidden_layers", 12),
        heads=data.get("num_attention_heads", 12),
        hidden=data.get("intermediate_size", 3072),
        eps=data.get("layer_norm_eps", 1e-12),
        act=data.get("hidden_act", "gelu"),
        relative_bias=data.get("use_relative_position_bias", False),
        shared_relative_bias=data.get("use_shared_relative_position_bias", False),
        absolute_positions=data.get("use_absolute_position_embeddings", False),
        layer_scale=data.get("layer_scale_init_value", 0.1),
        mean_pooling=data.get("use_mean_pooling", True),
    )


TIMM_ARGUMENTS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "heads",
    "init_values": "layer_scale",
    "use_rel_pos_bias": "relative_bias",
    "use_shared_rel_pos_bias": "shared_relative_bias",
    "use_abs_pos_emb": "absolute_positions",
    "qkv_bias": "qkv_bias",
}


def _from_timm(data: dict) -> BeitConfig | None:
    """timm's config.json: an architecture's name and, where the model differs from it, arguments."""
    name = data.get("architecture", "").split(".")[0].replace("_", "-")
    config = config_for(re.sub("^beitv2-", "beit-", name))
    if config is None:
        return None
    arguments = data.get("model_args") or {}
    values = {ours: arguments[theirs] for theirs, ours in TIMM_ARGUMENTS.items() if theirs in arguments}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    config = replace(config, **values)
    return replace(config, hidden=round(config.dim * arguments.get("mlp_ratio", config.hidden / config.dim)))


def config_to_json(config: BeitConfig, layout: str) -> dict:
    """config.json as transformers or timm read it; labels and preprocessing are added by the caller."""
    if layout == "timm":
        arguments = {theirs: getattr(config, ours) for theirs, ours in TIMM_ARGUMENTS.items()}
        arguments |= {"mlp_ratio": config.hidden / config.dim, "init_values": config.layer_scale or None}
        arguments |= {"global_pool": "avg" if config.mean_pooling else "token"}
        size = "large" if "large" in config.name else "base"
        architecture = f"beit_{size}_patch16_{384 if config.image_size == 384 else 224}"
        return {"architecture": architecture, "num_features": config.dim, "model_args": arguments}
    return {
        "architectures": ["BeitForImageClassification" if config.num_classes else "BeitModel"],
        "model_type": "beit",
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": config.act,
        "layer_norm_eps": config.eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "use_relative_position_bias": config.relative_bias,
        "use_shared_relative_position_bias": config.shared_relative_bias,
        "use_absolute_position_embeddings": config.absolute_positions,
        "layer_scale_init_value": config.layer_scale,
        "use_mean_pooling": config.mean_pooling,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
    }
