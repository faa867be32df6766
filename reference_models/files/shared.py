"""What the files of several picture families have in common: a block's parts and rows of key
tables, fields of config.json, positions.
"""

import re
from dataclasses import replace
from typing import Any

from torch import Tensor

from reference_models.errors import ModelError
from reference_models.files.names import Entry, fused, linear, rename
from reference_models.layers import resize_positions

# ours: theirs, of one block with separate projections; "clip" is transformers', 4 and 5 alike
BLOCK = {
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
    "clip": {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    | {f"attn.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    "open_clip": {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    },
}
QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
# beside these, what a library stores as one: {its name up to "weight" or "bias": ours}
PACKED = {"timm": {"attn.qkv.": QKV}, "open_clip": {"attn.in_proj_": QKV}}

# ours: (transformers' name in config.json, transformers' default), of ViT, DeiT and BEiT
ENCODER_FIELDS = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "hidden": ("intermediate_size", 3072),
    "eps": ("layer_norm_eps", 1e-12),
    "act": ("hidden_act", "gelu"),
}
# theirs: ours, of timm's model_args
ENCODER_ARGUMENTS = {"img_size": "image_size", "embed_dim": "dim", "num_heads": "heads"}
ENCODER_ARGUMENTS |= {name: name for name in ("patch_size", "depth", "qkv_bias")}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def patches(theirs: str, bias: bool = True) -> list[Entry]:
    """Rows of the projection of patches, which in their files is a convolution."""
    kernel = rename("patch_embed.proj.weight", f"{theirs}.weight", "kernel")
    return [kernel, rename("patch_embed.proj.bias", f"{theirs}.bias")][: 1 + bias]


def blocks(depth: int, theirs: str, parts: dict, packed: dict | None = None, single: dict | None = None) -> list[Entry]:
    """Rows of all blocks, in their files `theirs` and a number: layers {ours: theirs} in parts,
    what is `packed` (see PACKED), single parameters {ours: theirs}."""
    table = []
    for i in range(depth):
        own, other = f"blocks.{i}.", f"{theirs}{i}."
        for name, part in parts.items():
            table += linear(own + name, other + part)
        for part, names in (packed or {}).items():
            table += fused([own + name for name in names], f"{other}{part}weight", f"{other}{part}bias")
        table += [rename(own + name, other + part) for name, part in (single or {}).items()]
    return table


def read_fields(data: dict, known: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """{our field: value} from transformers' config.json; a field that the file lacks has
    transformers' default."""
    return {ours: _hashable(data.get(theirs, default)) for ours, (theirs, default) in known.items()}


def write_fields(config, known: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """The same fields for config.json, and the number of colours, which
    all these families share."""
    return {theirs: getattr(config, ours) for ours, (theirs, _) in known.items()} | {"num_channels": 3}


def timm_name(data: dict) -> str:
    """The architecture of timm's config.json, written as our names are."""
    return data.get("architecture", "").split(".")[0].replace("_", "-")


# arguments of timm that only training knows, or that accept other picture sizes
WITHOUT_EFFECT = re.compile(
    r"(?:\w+_)?drop(?:_path|_\w+)?_rate|num_classes|weight_init|fix_init|dynamic_img_\w+|strict_img_size|"
    r"always_partition|img_size|cache_dir"
)


def check_arguments(arguments: dict, known) -> None:
    """ModelError for the first of timm's model_args that changes the mathematics and is not known;
    `known` holds names, or pairs of a name and the one value that is."""
    for key, value in arguments.items():
        harmless = WITHOUT_EFFECT.fullmatch(key) or value in (None, False) or (key, value) == ("in_chans", 3)
        if not harmless and key not in known and (key, str(value)) not in known:
            raise ModelError(f"config.json: model_args has {key} = {value!r}, which is not known here")


def with_timm_arguments(config, data: dict, known: dict[str, str], seen: tuple = ()):
    """The configuration of an architecture with the arguments of timm's config.json,
    where it has some.

    config: None where the architecture is of another family; seen: arguments of which the file's
    tensors tell, or pairs of an argument and its one value. Where ours counts hidden units, timm
    has their ratio to the width.
    """
    if config is None:
        return None
    arguments = data.get("model_args") or {}
    check_arguments(arguments, {*known, "mlp_ratio", *seen})
    values = {ours: _hashable(arguments[theirs]) for theirs, ours in known.items() if theirs in arguments}
    if hasattr(config, "hidden"):
        ratio = arguments.get("mlp_ratio", config.hidden / config.dim)
        values["hidden"] = round(values.get("dim", config.dim) * ratio)
    return replace(config, **values)


def to_timm(config, architecture: str, known: dict[str, str], features: int) -> dict:
    """timm's config.json: with the arguments, any architecture of the family becomes this model."""
    arguments = {theirs: getattr(config, ours) for theirs, ours in known.items()}
    if hasattr(config, "hidden"):
        arguments["mlp_ratio"] = config.hidden / config.dim
    return {"architecture": architecture, "num_features": features, "model_args": arguments}


def adapt_positions(state: dict[str, Tensor], old, new, prefix: int, key: str = "pos_embed") -> None:
    """Interpolate absolute positions in `state` to another patch grid, in place; `prefix`
    tokens keep theirs."""
    if key in state and old.grid != new.grid:
        state[key] = resize_positions(state[key], new.grid, prefix, old.grid)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
