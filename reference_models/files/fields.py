"""Fields of transformers' config.json: reading and writing them by a table."""

from typing import Any

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
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def read_fields(data: dict, known: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """{our field: value} from transformers' config.json, with its default for what that lacks."""
    return {ours: hashable(data.get(theirs, default)) for ours, (theirs, default) in known.items()}


def write_fields(config, known: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """The same fields for config.json, and the number of colours."""
    return {theirs: getattr(config, ours) for ours, (theirs, _) in known.items()} | {"num_channels": 3}


def size_name(kind: str, values: dict) -> str:
    """The name of a configuration that was read."""
    return f"{kind}-{values['dim']}-patch{values['patch_size']}-{values['image_size']}"


def hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
