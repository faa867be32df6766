"""The files of MobileNetV2 checkpoints. See load.py for the protocol."""

import re
from dataclasses import replace

from reference_models.files.names import Entry, linear, rename
from reference_models.files.preprocess import IMAGENET
from reference_models.files.shapes import classes_in
from reference_models.mobilenet import MobileNet, MobileNetConfig

build = MobileNet
layouts = {"torchvision": ("",), "timm": ("",)}
adapter_layouts = ("torchvision", "timm")
ignored = r"num_batches_tracked$"
optional = r"^head"
# crop 224 of 256, and in proportion at other sizes
preprocess = {**IMAGENET, "interpolation": "bilinear", "resize": "shortest", "scale": (224, 256)}

names = ["mobilenet-v2"]
# blocks of each stage, in the order of timm's blocks.{stage}.{block}
STAGES = (1, 2, 3, 4, 3, 3, 1)
# of a block, ours: timm's; the first one does not widen its input
FIRST = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
OTHERS = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}


def config_for(name: str) -> MobileNetConfig | None:
    """mobilenet-v2, or mobilenet-v2-{width in percent} such as mobilenet-v2-50."""
    match = re.fullmatch(r"mobilenet-v2(?:-(\d+))?", name)
    return MobileNetConfig(name, width=int(match[1] or 100) / 100) if match else None


def key_table(config: MobileNetConfig, layout: str) -> list[Entry]:
    """Our names are torchvision's but for the head; timm counts stages and blocks, not layers."""
    table = linear("head", "classifier.1" if layout == "torchvision" else "classifier")
    for ours, timm in _layers().items():
        parts = ("weight", "bias", "running_mean", "running_var") if "bn" in timm else ("weight",)
        other = ours if layout == "torchvision" else timm
        table += [rename(f"{ours}.{part}", f"{other}.{part}") for part in parts]
    return table


def _layers() -> dict[str, str]:
    """{our name: timm's} of every convolution and norm: stem, seventeen blocks, last layer."""
    layers = {"features.0.0": "conv_stem", "features.0.1": "bn1"}
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(STAGES) for i in range(count)]
    for i, place in enumerate(places, start=1):
        parts = FIRST if i == 1 else OTHERS
        layers |= {f"features.{i}.conv.{ours}": f"{place}.{timm}" for ours, timm in parts.items()}
    return layers | {"features.18.0": "conv_head", "features.18.1": "bn2"}


def fit_config(config: MobileNetConfig, shapes: dict[str, tuple]) -> MobileNetConfig:
    return replace(config, num_classes=classes_in(shapes))


def config_from_json(data: dict) -> MobileNetConfig | None:
    match = re.match(r"mobilenetv2_(\d+)(\.|$)", data.get("architecture", ""))
    return config_for("mobilenet-v2" + ("" if match[1] == "100" else f"-{int(match[1])}")) if match else None


def config_to_json(config: MobileNetConfig, layout: str) -> dict:
    """As timm reads it; torchvision has none."""
    return {"architecture": f"mobilenetv2_{round(config.width * 100):03d}", "num_features": 1280}
