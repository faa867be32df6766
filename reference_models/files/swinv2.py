"""The files of Swin V2 checkpoints. See load.py for the protocol."""

import re
from dataclasses import replace

from reference_models.files import swin as swin_files
from reference_models.files.names import Entry, fused, rows
from reference_models.files.shapes import adapt_positions, classes_in
from reference_models.files.swin import SIZES, block_names, stem
from reference_models.files.timm import timm_name, to_timm, with_timm_arguments
from reference_models.swinv2 import SwinTransformerV2, SwinV2Config

build, adapt = SwinTransformerV2, adapt_positions  # the position network needs no interpolation
# no adapter in timm's: its Swin V2 reads qkv.weight instead of calling qkv
layouts = {"transformers4": ("swinv2.",), "transformers5": ("swinv2.",)}
layouts |= dict.fromkeys(("timm", "torchvision", "original"), ("",))
ignored, optional = swin_files.ignored + r"|\.k_bias$", swin_files.optional
preprocess, notes = swin_files.preprocess, swin_files.notes

COSINE = {name: name for name in ("attn.logit_scale", "attn.cpb_mlp.0", "attn.cpb_mlp.2.weight")}
PARTS = {
    layout: {ours: theirs for ours, theirs in parts.items() if not ours.endswith("table")} | COSINE
    for layout, parts in swin_files.PARTS.items()
}
PARTS["transformers4"] |= {
    "attn.logit_scale": "attention.self.logit_scale",
    "attn.cpb_mlp.0": "attention.self.continuous_position_bias_mlp.0",
    "attn.cpb_mlp.2.weight": "attention.self.continuous_position_bias_mlp.2.weight",
}
# transformers 5 left the names of this family as they were
PARTS["transformers5"] = PARTS["transformers4"]
for layout in ("timm", "original"):
    PARTS[layout] |= {f"attn.{name}_proj.bias": f"attn.{name}_bias" for name in "qv"}

TUNED = ("12to16-192to256", "12to24-192to384")
names = ["swinv2-nano-patch4-window6-48"]
names += [f"swinv2-{size}-patch4-window{w}-256" for size in ("tiny", "small", "base") for w in (8, 16)]
names += [f"swinv2-{size}-patch4-window12-192" for size in ("base", "large")]
names += [f"swinv2-{size}-patch4-window{tuned}" for size in ("base", "large") for tuned in TUNED]


def config_for(name: str) -> SwinV2Config | None:
    """swinv2-{size}-patch{p}-window{w}-{side}; after fine-tuning at a larger size
    window12to24-192to384, which window 24, that exists only so, means by itself."""
    pattern = rf"swinv2-({'|'.join(SIZES)})-patch(\d+)-window(?:(\d+)to)?(\d+)-(?:(\d+)to)?(\d+)"
    match = re.fullmatch(pattern, name)
    if not match:
        return None
    sizes, patch, window, side = SIZES[match[1]], int(match[2]), int(match[4]), int(match[6])
    before = int(match[3] or (12 if window == 24 else 0))
    grid = int(match[5] or 192) // patch
    pretrained = tuple(min(before, grid >> stage) for stage in range(len(sizes[1])))
    return SwinV2Config(name, side, patch, *sizes, window=window, pretrained_windows=pretrained)


def key_table(config: SwinV2Config, layout: str) -> list[Entry]:
    """Our names beside those of transformers, timm, torchvision and the original repository."""
    table = stem(config, layout, "swinv2.")
    for ours, theirs in block_names(config, layout, "swinv2."):
        table += rows(ours, theirs, PARTS[layout])
        if not layout.startswith("transformers"):
            table += fused([f"{ours}attn.{name}_proj" for name in "qkv"], f"{theirs}attn.qkv.weight")
        if layout == "torchvision":  # stores a key bias, and sets it to zero before use
            biases = tuple(f"{ours}attn.{name}_proj.bias" for name in "qv")
            table.append(Entry(biases, f"{theirs}attn.qkv.bias", "cat_without_k"))
    return table


def fit_config(config: SwinV2Config, shapes: dict[str, tuple]) -> SwinV2Config:
    return replace(config, num_classes=classes_in(shapes), absolute_positions="pos_embed" in shapes)


TIMM_ARGUMENTS = swin_files.TIMM_ARGUMENTS | {"pretrained_window_sizes": "pretrained_windows"}


def config_from_json(data: dict) -> SwinV2Config | None:
    if "model_type" not in data:
        name = re.sub(r"^(swinv2-\w+)-window", r"\1-patch4-window", timm_name(data))
        return with_timm_arguments(config_for(name), data, TIMM_ARGUMENTS, (("global_pool", "avg"),))
    if data["model_type"] != "swinv2":
        return None
    config = swin_files.from_transformers(SwinV2Config(), data)
    pretrained = data.get("pretrained_window_sizes") or (0,) * len(config.depths)
    return replace(config, pretrained_windows=tuple(pretrained))


def config_to_json(config: SwinV2Config, layout: str) -> dict:
    if layout == "timm":
        known = config.name in names[1:]
        name = config.name.replace("-", "_").replace("_patch4", "") if known else "swinv2_tiny_window8_256"
        return to_timm(config, name, TIMM_ARGUMENTS, swin_files.last_width(config))
    data = swin_files.to_transformers(config, "Swinv2")
    return data | {"pretrained_window_sizes": list(config.pretrained_windows)}
