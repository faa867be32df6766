"""The files of Swin checkpoints. See load.py for the protocol."""

import math
import re
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from reference_models.errors import ModelError
from reference_models.files.fields import NO_DROPOUT, read_fields, write_fields
from reference_models.files.names import BLOCK, PACKED, Entry, rows
from reference_models.files.preprocess import IMAGENET
from reference_models.files.shapes import adapt_positions, classes_in
from reference_models.files.timm import timm_name, to_timm, with_timm_arguments
from reference_models.swin import SwinConfig, SwinTransformer

build = SwinTransformer
# "original": the Swin repository and timm before 0.9, which merge at the end of a stage
layouts = {"transformers4": ("swin.",), "transformers5": ("swin.",)}
layouts |= dict.fromkeys(("timm", "torchvision", "original"), ("",))
adapter_layouts = ("transformers5", "transformers4", "timm")
# computed, or of pretraining
ignored = r"relative_position_index|attn_mask|relative_coords_table|mask_token$"
optional = r"^head"
preprocess = {**IMAGENET, "interpolation": "bicubic", "resize": "squash"}

#             width depths heads of the stages
SIZES = {
    "nano": (32, (2, 2), (2, 4)),
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}

# of timm's swin_s3: the depth of the third stage, the windows of all
S3 = {"tiny": (6, (7, 7, 14, 7)), "small": (18, (14, 14, 14, 7)), "base": (30, (7, 7, 14, 7))}

TABLE = "attn.relative_position_bias_table"
PARTS = {  # of a block
    "transformers4": {
        **BLOCK["transformers4"],
        **{f"attn.{name[0]}_proj": f"attention.self.{name}" for name in ("query", "key", "value")},
        TABLE: "attention.self.relative_position_bias_table",
    },
    "transformers5": {**BLOCK["transformers5"], TABLE: "attention.relative_position_bias.relative_position_bias_table"},
    "timm": {**BLOCK["timm"], TABLE: TABLE},
}
PARTS["original"] = PARTS["timm"]
PARTS["torchvision"] = {**PARTS["timm"], "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}

FIELDS = {  # that Swin and Swin V2 share; ours: (transformers' name, its default)
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 4),
    "dim": ("embed_dim", 96),
    "depths": ("depths", (2, 2, 6, 2)),
    "heads": ("num_heads", (3, 6, 12, 24)),
    "window": ("window_size", 7),
    "mlp_ratio": ("mlp_ratio", 4.0),
    "eps": ("layer_norm_eps", 1e-5),
    "act": ("hidden_act", "gelu"),
    "qkv_bias": ("qkv_bias", True),
    "absolute_positions": ("use_absolute_embeddings", False),
}
TIMM_ARGUMENTS = {"img_size": "image_size", "embed_dim": "dim", "num_heads": "heads", "window_size": "window"}
TIMM_ARGUMENTS |= {name: name for name in ("patch_size", "depths", "mlp_ratio", "qkv_bias")}
names = ["swin-nano-patch4-window6-48", *(f"swin-{size}-patch4-window7-224" for size in [*SIZES][1:])]
names += [f"swin-{size}-patch4-window12-384" for size in ("base", "large")]


def config_for(name: str) -> SwinConfig | None:
    """swin-{size}-patch{p}-window{w}-{side}, such as "swin-base-patch4-window7-224", or
    swin-s3-{size}-{side}."""
    if match := re.fullmatch(rf"swin-s3-({'|'.join(S3)})-(\d+)", name):
        depth, windows = S3[match[1]]
        return SwinConfig(name, int(match[2]), depths=(2, 2, depth, 2), window=windows)
    match = re.fullmatch(rf"swin-({'|'.join(SIZES)})-patch(\d+)-window(\d+)-(\d+)", name)
    if not match:
        return None
    patch, window, side = (int(match[i]) for i in (2, 3, 4))
    return SwinConfig(name, side, patch, *SIZES[match[1]], window=window)


def key_table(config: SwinConfig, layout: str) -> list[Entry]:
    """Our names beside transformers', timm's, torchvision's and the original repository's."""
    table, packed = stem(config, layout, "swin."), {} if layout.startswith("transformers") else PACKED["timm"]
    for ours, theirs in block_names(config, layout, "swin."):
        table += rows(ours, theirs, PARTS[layout], packed)
    return table


def stem(config: SwinConfig, layout: str, base: str) -> list[Entry]:
    """Everything outside the blocks."""
    patch, patch_norm, norm, head = {
        "timm": ("patch_embed.proj", "patch_embed.norm", "norm", "head.fc"),
        "original": ("patch_embed.proj", "patch_embed.norm", "norm", "head"),
        "torchvision": ("features.0.0", "features.0.2", "norm", "head"),
    }.get(
        layout,
        (f"{base}embeddings.patch_embeddings.projection", f"{base}embeddings.norm", f"{base}layernorm", "classifier"),
    )
    table = rows("", "", {"patch_embed.proj": patch, "patch_norm": patch_norm, "norm": norm, "head": head})
    if layout.startswith("transformers"):
        table += rows("", base, {"pos_embed": "embeddings.position_embeddings"})
    same = {name: name for name in ("norm", "reduction.weight")}
    for stage in range(len(config.depths) - 1):
        merging = {
            "timm": f"layers.{stage + 1}.downsample",
            "original": f"layers.{stage}.downsample",
            "torchvision": f"features.{2 * stage + 2}",
        }.get(layout, f"{base}encoder.layers.{stage}.downsample")
        table += rows(f"downsample.{stage}.", f"{merging}.", same)
    return table


def block_names(config: SwinConfig, layout: str, base: str):
    """(ours, theirs) for every block: ours count through, theirs start anew in every stage."""
    place = {"torchvision": "features.{1}.{2}"} | dict.fromkeys(("timm", "original"), "layers.{0}.blocks.{2}")
    place = place.get(layout, base + "encoder.layers.{0}.blocks.{2}")
    pairs = ((stage, i) for stage, depth in enumerate(config.depths) for i in range(depth))
    return ((f"blocks.{n}.", place.format(stage, 2 * stage + 1, i) + ".") for n, (stage, i) in enumerate(pairs))


def fit_config(config: SwinConfig, shapes: dict[str, tuple]) -> SwinConfig:
    """With its classes, windows and kind of positions."""
    config = replace(config, num_classes=classes_in(shapes), absolute_positions="pos_embed" in shapes)
    first = [sum(config.depths[:stage]) for stage in range(len(config.depths))]
    tables = [f"blocks.{i}.{TABLE}" for i in first]
    if not all(key in shapes for key in tables):
        return config
    windows = tuple((math.isqrt(shapes[key][0]) + 1) // 2 for key in tables)
    if windows != tuple(config.window_of(stage) for stage in range(len(windows))):
        config = replace(config, window=windows[0] if len(set(windows)) == 1 else windows)
    return config


def adapt(state: dict[str, Tensor], old: SwinConfig, new: SwinConfig) -> None:
    """Interpolate bias tables and positions in `state` to other windows or sizes, in place."""
    adapt_positions(state, old, new)
    stages = [stage for stage, depth in enumerate(new.depths) for _ in range(depth)]
    for i, stage in enumerate(stages):
        key, window = f"blocks.{i}.{TABLE}", new.window_of(stage)
        if key in state and window != old.window_of(stage):
            state[key] = resize_window_table(state[key], old.window_of(stage), window)


def notes(config: SwinConfig, layout: str) -> list[str]:
    """Where windows do not divide the grid of a stage, libraries pad it each in their own way."""
    if layout not in ("timm", "torchvision", "original"):
        return []
    for stage in range(len(config.depths)):
        (height, width), w = (-(-side // 2**stage) for side in config.grid), config.window_of(stage)
        if height % w or width % w:
            return [
                f"windows: {w} x {w} do not divide the {height} x {width} patches of stage {stage + 1}; padded as "
                f"transformers does it, not quite as {'timm' if layout == 'original' else layout} does"
            ]
    return []


def resize_window_table(table: Tensor, old: int, new: int) -> Tensor:
    """Bicubic interpolation of a bias table ((2 w - 1)^2, h), as the Swin repository does."""
    grid = table.T.reshape(1, -1, 2 * old - 1, 2 * old - 1).float()
    grid = F.interpolate(grid, size=(2 * new - 1, 2 * new - 1), mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].T.to(table.dtype).contiguous()


def config_from_json(data: dict) -> SwinConfig | None:
    if "model_type" not in data:
        return with_timm_arguments(config_for(timm_name(data)), data, TIMM_ARGUMENTS, (("global_pool", "avg"),))
    return from_transformers(SwinConfig(), data) if data["model_type"] == "swin" else None


def from_transformers(config: SwinConfig, data: dict) -> SwinConfig:
    """The configuration with transformers' fields, for Swin and Swin V2."""
    values = read_fields(data, FIELDS)
    size = f"patch{values['patch_size']}-window{values['window']}-{values['image_size']}"
    return replace(config, name=f"{data['model_type']}-{values['dim']}-{size}", **values)


def config_to_json(config: SwinConfig, layout: str) -> dict:
    if layout == "timm":
        known = config.name in names[1:]
        name = config.name.replace("-", "_") if known else "swin_tiny_patch4_window7_224"
        return to_timm(config, name, TIMM_ARGUMENTS, last_width(config))
    return to_transformers(config, "Swin")


def last_width(config: SwinConfig) -> int:
    """The width of the last stage, which the head reads."""
    return config.dim * 2 ** (len(config.depths) - 1)


def to_transformers(config: SwinConfig, cls: str) -> dict:
    """Fields that Swin and Swin V2 share."""
    if not isinstance(config.window, int):
        raise ModelError(f"{config.name}: transformers has one window for all stages, not {config.window}")
    kind = [cls + ("ForImageClassification" if config.num_classes else "Model")]
    fields = {"architectures": kind, "model_type": config.family, **write_fields(config, FIELDS)}
    return {**fields, **NO_DROPOUT, "drop_path_rate": 0.0}
