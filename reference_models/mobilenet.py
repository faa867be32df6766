"""MobileNetV2: torchvision's layers behind this package's interface.

Paper: Sandler et al. 2018, arXiv:1801.04381. Shapes: B pictures, h x w cells (7 x 7 at 224
pixels), 1280 channels.
"""

import re
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MobileNetV2

from reference_models.files.names import Entry, linear, rename
from reference_models.layers import init_weights

# layers of each stage, its stride and where its blocks widen first: the order of timm's
# blocks.{stage}.{block}
STAGES = (1, 2, 3, 4, 3, 3, 1)


@dataclass(frozen=True)
class MobileNetConfig:
    """width multiplies the channels of all layers but the last one; num_classes 0 means no head."""

    name: str = "mobilenet-v2"
    image_size: int = 224
    width: float = 1.0
    num_classes: int = 1000
    family: str = "mobilenet"


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm whose statistics move only while its own weights are trained: a frozen one
    stays in eval mode."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.num_batches_tracked = None  # only a momentum of None would read it; many files lack it

    def forward(self, x: Tensor) -> Tensor:
        moving = self.training and self.weight.requires_grad
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, moving, self.momentum, self.eps)

    def _load_from_state_dict(self, *args):
        # BatchNorm's own would ask for num_batches_tracked
        nn.Module._load_from_state_dict(self, *args)


class MobileNet(nn.Module):
    """Pictures (B, 3, H, W) -> logits (B, num_classes); H and W are multiples of 32."""

    head_modules = ("head",)
    layouts = ("torchvision", "timm")

    def __init__(self, config: MobileNetConfig):
        super().__init__()
        self.config = config
        body = MobileNetV2(num_classes=1, width_mult=config.width, norm_layer=BatchNorm)
        self.features, self.num_features = body.features, body.last_channel
        self.num_flat_features = self.num_features * (-(-config.image_size // 32)) ** 2
        self.head = nn.Identity()
        self.reset_classifier(config.num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new, randomly initialised head for `num_classes` classes; 0 removes it."""
        self.config = replace(self.config, num_classes=num_classes)
        weight = self.features[0][0].weight
        like = {"device": weight.device, "dtype": weight.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()
        init_weights(self.head)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the cells of the last feature map, row by row, (B, h w, 1280)."""
        return self.features(x).flatten(2).transpose(1, 2)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean over all cells, (B, 1280)."""
        return self.features(x).mean((2, 3))

    def flat(self, x: Tensor) -> Tensor:
        """All cells in one row, (B, h w 1280): 62,720 numbers at 224 pixels."""
        return self.forward_features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, num_classes)."""
        return self.head(self.pooled(x))

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """[]: a convolutional network has no attention."""
        return []

    def key_table(self, layout: str) -> list[Entry]:
        return key_table(self.config, layout)


# ---- what load.py asks of a family: names, key tables, sizes, configuration files

build = MobileNet
layouts = {"torchvision": ("",), "timm": ("",)}
ignored = r"num_batches_tracked$"
optional = r"^head"
layout_settings = {}
preprocess = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bilinear",
    "resize": "shortest",
    "scale": (224, 256),  # crop 224 of 256, and in proportion at other sizes
}


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


def adapt(state: dict[str, Tensor], old: MobileNetConfig, new: MobileNetConfig) -> None:
    """Convolutions fit every picture size."""


def config_from_json(data: dict) -> MobileNetConfig | None:
    """Read timm's config.json; None where it is of another family."""
    match = re.match(r"mobilenetv2_(\d+)(\.|$)", data.get("architecture", ""))
    return config_for("mobilenet-v2" + ("" if match[1] == "100" else f"-{int(match[1])}")) if match else None


def config_to_json(config: MobileNetConfig, layout: str) -> dict:
    """config.json as timm reads it; torchvision has none."""
    return {"architecture": f"mobilenetv2_{round(config.width * 100):03d}", "num_features": 1280}
