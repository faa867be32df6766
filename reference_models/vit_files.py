"""The files of ViT and DeiT checkpoints: names, key tables, config.json, preprocessing. Protocol: see load.py."""

import math
import re
from dataclasses import replace

from torch import Tensor

from reference_models.errors import ModelError
from reference_models.layers import resize_positions
from reference_models.names import Entry, fused, linear, rename
from reference_models.vit import SIZES, VisionTransformer, ViTConfig

build = VisionTransformer
layouts = {  # of weight files, with the prefixes that their names may carry; the first is the table's own
    "transformers4": ("vit.", "deit."),
    "transformers5": ("vit.", "deit."),
    "timm": ("",),
    "torchvision": ("",),
}
ignored = r"^$"  # keys of a file that mean nothing to the model
optional = r"^(pooler|head|dist_token)"  # our names that a file may lack or have in addition
layout_settings = {"transformers4": {"eps": 1e-12}, "transformers5": {"eps": 1e-12}}
preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize": "squash"}

PARTS = {
    "transformers4": {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.q_proj": "attention.attention.query",
        "attn.k_proj": "attention.attention.key",
        "attn.v_proj": "attention.attention.value",
        "attn.out_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
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
    },
    "timm": {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.out_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    "torchvision": {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.out_proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    },
}


def config_for(name: str) -> ViTConfig | None:
    """vit-{size}-patch{p}-{side}, such as "vit-tiny-patch16-224". None where the name is of another
    family.
    """
    match = re.fullmatch(rf"vit-({'|'.join(SIZES)})-patch(\d+)-(\d+)", name)
    if not match:
        return None
    dim, depth, heads, hidden = SIZES[match[1]]
    sizes = {"dim": dim, "depth": depth, "heads": heads, "hidden": hidden}
    return ViTConfig(name=name, patch_size=int(match[2]), image_size=int(match[3]), **sizes)


def file_preprocess(file_name: str) -> dict:
    """DeiT's weights carry ViT's names but want ImageNet's mean and deviation; only the file's name tells."""
    if "deit" not in file_name.lower():
        return {}
    return {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic"}


def names() -> list[str]:
    large = [f"vit-{size}-patch16-{side}" for size in SIZES if size != "nano" for side in (224, 384)]
    return ["vit-nano-patch8-48", *large]


def key_table(config: ViTConfig, layout: str) -> list[Entry]:
    """Our names beside those of transformers 4 and 5 (DeiT's with a second token), timm and torchvision."""
    if layout.startswith("transformers"):
        base = "deit." if config.distilled else "vit."
        table = _outside(base, "embeddings.patch_embeddings.projection", "classifier")
        table += [rename("cls_token", f"{base}embeddings.cls_token")]
        table += [
            rename("pos_embed", f"{base}embeddings.position_embeddings"),
            *linear("norm", f"{base}layernorm"),
        ]
        table += [rename("dist_token", f"{base}embeddings.distillation_token")]
        table += linear("pooler.dense", f"{base}pooler.dense")
        blocks = f"{base}encoder.layer" if layout == "transformers4" else f"{base}layers"
    elif layout == "timm":
        table = [*_outside("", "patch_embed.proj", "head"), *linear("norm", "norm")]
        table += [rename(token, token) for token in ("cls_token", "dist_token", "pos_embed")]
        blocks = "blocks"
    else:
        table = [*_outside("", "conv_proj", "heads.head"), *linear("norm", "encoder.ln")]
        table += [rename("cls_token", "class_token"), rename("pos_embed", "encoder.pos_embedding")]
        blocks = "encoder.layers.encoder_layer_"
    separator = "" if layout == "torchvision" else "."
    for i in range(config.depth):
        block = f"{blocks}{separator}{i}"
        for ours, theirs in PARTS[layout].items():
            table += linear(f"blocks.{i}.{ours}", f"{block}.{theirs}")
        qkv = [f"blocks.{i}.attn.{name}_proj" for name in "qkv"]
        if layout == "timm":
            table += fused(qkv, f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias")
        elif layout == "torchvision":
            attention = f"{block}.self_attention"
            table += fused(qkv, f"{attention}.in_proj_weight", f"{attention}.in_proj_bias")
    return table


def _outside(base: str, patch: str, head: str) -> list[Entry]:
    kernel = rename("patch_embed.proj.weight", f"{base}{patch}.weight", "kernel")
    return [kernel, rename("patch_embed.proj.bias", f"{base}{patch}.bias"), *linear("head", head)]


def fit_config(config: ViTConfig, shapes: dict[str, tuple]) -> ViTConfig:
    """The configuration with what the shapes of a file (our names) say of it: classes, second token, picture
    size.
    """
    classes = shapes["head.weight"][0] if "head.weight" in shapes else 0
    config = replace(config, num_classes=classes, distilled="dist_token" in shapes)
    rows, cols = config.grid
    patches = (
        shapes["pos_embed"][1] - (2 if config.distilled else 1) if "pos_embed" in shapes else rows * cols
    )
    if patches != rows * cols:
        config = replace(config, image_size=math.isqrt(patches) * config.patch_size)
    return config


def adapt(state: dict[str, Tensor], old: ViTConfig, new: ViTConfig) -> None:
    """Interpolate the position embeddings in `state` from the old picture size to the new one, in place."""
    if "pos_embed" in state and old.grid != new.grid:
        prefix = 2 if new.distilled else 1
        state["pos_embed"] = resize_positions(state["pos_embed"], new.grid, prefix, old.grid)


def config_from_json(data: dict) -> ViTConfig | None:
    """Read transformers' or timm's config.json; None where it is of another family."""
    if "model_type" not in data:
        return _from_timm(data)
    if data["model_type"] not in ("vit", "deit"):
        return None
    side = data.get("image_size", 224)
    return ViTConfig(
        name=f"vit-{data.get('hidden_size', 768)}-patch{data.get('patch_size', 16)}-{side}",
        image_size=side if isinstance(side, int) else tuple(side),
        patch_size=data.get("patch_size", 16),
        dim=data.get("hidden_size", 768),
        depth=data.get("num_hidden_layers", 12),
        heads=data.get("num_attention_heads", 12),
        hidden=data.get("intermediate_size", 3072),
        eps=data.get("layer_norm_eps", 1e-12),
        act=data.get("hidden_act", "gelu"),
        qkv_bias=data.get("qkv_bias", True),
        distilled=data["model_type"] == "deit",
    )


def config_to_json(config: ViTConfig, layout: str) -> dict:
    """config.json as transformers or timm read it; labels and preprocessing are added by the caller."""
    if layout == "timm":
        return _to_timm(config)
    kind = "deit" if config.distilled else "vit"
    cls = {"vit": "ViT", "deit": "DeiT"}[kind] + ("ForImageClassification" if config.num_classes else "Model")
    return {
        "architectures": [cls],
        "model_type": kind,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": config.act,
        "layer_norm_eps": config.eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


TIMM_ARGUMENTS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "heads",
    "qkv_bias": "qkv_bias",
}


def _from_timm(data: dict) -> ViTConfig | None:
    """timm's config.json: an architecture's name and, where the model differs from it, arguments."""
    name = data.get("architecture", "").split(".")[0].replace("_", "-")
    config = config_for(re.sub("^deit3?-", "vit-", name))
    if config is None:
        return None
    arguments = data.get("model_args") or {}
    values = {ours: arguments[theirs] for theirs, ours in TIMM_ARGUMENTS.items() if theirs in arguments}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    config = replace(config, **values)
    return replace(config, hidden=round(config.dim * arguments.get("mlp_ratio", config.hidden / config.dim)))


def _to_timm(config: ViTConfig) -> dict:
    """timm's config.json: with the arguments, any architecture of the family becomes this model."""
    if config.distilled:
        raise ModelError(
            f"{config.name}: timm's distilled models have a second head; write it for transformers"
        )
    arguments = {theirs: getattr(config, ours) for theirs, ours in TIMM_ARGUMENTS.items()}
    arguments["mlp_ratio"] = config.hidden / config.dim
    architecture = config.name if config.name in names()[1:] else "vit-base-patch16-224"
    architecture = architecture.replace("-", "_")
    return {"architecture": architecture, "num_features": config.dim, "model_args": arguments}
