"""The files of MobileNetV2 checkpoints: names, key tables, sizes. See load.py for the protocol."""

import re
from dataclasses import replace

from reference_models.files.names import Entry, linear, rename
from reference_models.files.preprocess import IMAGENET
from reference_models.mobilenet import MobileNet, MobileNetConfig

build = MobileNet
layouts = {"torchvision": ("",), "timm": ("",)}
adapter_layouts = ("torchvision", "timm")
ignored = r"num_batches_tracked$"
optional = r"^head"
# crop 224 of 256, and in proportion at other sizes
preprocess = {**IMAGENET, "interpolation": "bilinear", "resize": "shortest", "scale": (224, 256)}

# blocks of each stage, in the order of timm's blocks.{stage}.{block}
STAGES = (1, 2, 3, 4, 3, 3, 1)


def names() -> list[str]:
    return ["mobilenet-v2"]


def config_for(name: str) -> MobileNetConfig | None:
    """mobilenet-v2, or mobilenet-v2-{width in percent} such as mobilenet-v2-50; None for other
    families' names."""
    match = re.fullmatch(r"mobilenet-v2(?:-(\d+))?", name)
    return MobileNetConfig(name, width=int(match[1] or 100) / 100) if match else None


def key_table(config: MobileNetConfig, layout: str) -> list[Entry]:
    """Our names are torchvision's but for the head; timm counts stages and blocks where
    those count layers."""
    table = linear("head", "classifier.1" if layout == "torchvision" else "classifier")
    theirs = _timm_names()
    for ours, kind in _layers():
        other = ours if layout == "torchvision" else theirs[ours]
        parts = ("weight",) if kind == "conv" else ("weight", "bias", "running_mean", "running_var")
        table += [rename(f"{ours}.{part}", f"{other}.{part}") for part in parts]
    return table


def _layers() -> list[tuple[str, str]]:
    """(our name, "conv" or "norm") of every layer: stem, seventeen blocks, last layer."""
    layers = [("features.0.0", "conv"), ("features.0.1", "norm")]
    for i in range(1, sum(STAGES) + 1):
        pairs = [("0.0", "0.1"), ("1", "2")] if i == 1 else [("0.0", "0.1"), ("1.0", "1.1"), ("2", "3")]
        for conv, norm in pairs:  # the first block does not widen its input
            layers += [(f"features.{i}.conv.{conv}", "conv"), (f"features.{i}.conv.{norm}", "norm")]
    return [*layers, ("features.18.0", "conv"), ("features.18.1", "norm")]


def _timm_names() -> dict[str, str]:
    names = {"features.0.0": "conv_stem", "features.0.1": "bn1"}
    names |= {"features.18.0": "conv_head", "features.18.1": "bn2"}
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(STAGES) for i in range(count)]
    for i, place in enumerate(places, start=1):
        ours = ("0.0", "0.1", "1", "2") if i == 1 else ("0.0", "0.1", "1.0", "1.1", "2", "3")
        theirs = ("conv_dw", "bn1", "conv_pw", "bn2")
        if i > 1:
            theirs = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
        for our_part, their_part in zip(ours, theirs, strict=True):
            names[f"features.{i}.conv.{our_part}"] = f"{place}.{their_part}"
    return names


def fit_config(config: MobileNetConfig, shapes: dict[str, tuple]) -> MobileNetConfig:
    return replace(config, num_classes=shapes["head.weight"][0] if "head.weight" in shapes else 0)


def config_from_json(data: dict) -> MobileNetConfig | None:
    """Read timm's config.json; None where it is of another family."""
    match = re.match(r"mobilenetv2_(\d+)(\.|$)", data.get("architecture", ""))
    return config_for("mobilenet-v2" + ("" if match[1] == "100" else f"-{int(match[1])}")) if match else None


def config_to_json(config: MobileNetConfig, layout: str) -> dict:
    """config.json as timm reads it; torchvision has none."""
    return {"architecture": f"mobilenetv2_{round(config.width * 100):03d}", "num_features": 1280}
