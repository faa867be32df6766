"""timm's config.json: an architecture's name and its arguments."""

import re
from dataclasses import replace
from typing import Any

from reference_models.errors import ModelError
from reference_models.files.fields import hashable

# theirs: ours, of timm's model_args
ENCODER_ARGUMENTS = {"img_size": "image_size", "embed_dim": "dim", "num_heads": "heads"}
ENCODER_ARGUMENTS |= {name: name for name in ("patch_size", "depth", "qkv_bias")}
# arguments of timm that only training knows, or that accept other picture sizes
WITHOUT_EFFECT = re.compile(
    r"(?:\w+_)?drop(?:_path|_\w+)?_rate|num_classes|weight_init|fix_init|dynamic_img_\w+|strict_img_size|"
    r"always_partition|img_size|cache_dir"
)


def timm_name(data: dict) -> str:
    """The architecture of timm's config.json, written as our names are."""
    return data.get("architecture", "").split(".")[0].replace("_", "-")


def given(arguments: dict, known: dict[str, str]) -> dict[str, Any]:
    """{our field: value} of those of timm's model_args that are given; known: {theirs: ours}."""
    return {ours: hashable(arguments[theirs]) for theirs, ours in known.items() if theirs in arguments}


def check_arguments(arguments: dict, known) -> None:
    """ModelError for the first of timm's model_args that changes the mathematics and is not known;
    `known` holds names, or pairs of a name and the one value that is."""
    for key, value in arguments.items():
        harmless = WITHOUT_EFFECT.fullmatch(key) or value in (None, False) or (key, value) == ("in_chans", 3)
        if not harmless and key not in known and (key, str(value)) not in known:
            raise ModelError(f"config.json: model_args has {key} = {value!r}, which is not known here")


def with_timm_arguments(config, data: dict, known: dict[str, str], seen: tuple = ()):
    """The configuration of an architecture, None where that is of another family, with the
    arguments of timm's config.json. seen: arguments of which the file's tensors tell, or pairs of
    an argument and its one value. Where ours counts hidden units, timm has their ratio to dim."""
    if config is None:
        return None
    arguments = data.get("model_args") or {}
    check_arguments(arguments, {*known, "mlp_ratio", *seen})
    values = given(arguments, known)
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
