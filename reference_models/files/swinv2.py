"""The files of Swin V2 checkpoints: names, key tables, config.json. See
load.py for the protocol."""

import re
from dataclasses import replace

from torch import Tensor

from reference_models.files import swin as swin_files
from reference_models.files.names import Entry, fused, linear, rename
from reference_models.files.shared import adapt_positions, timm_name, to_timm, with_timm_arguments
from reference_models.files.swin import SIZES, block, block_names, stem
from reference_models.swinv2 import SwinTransformerV2, SwinV2Config

build = SwinTransformerV2
layouts = {"transformers4": ("swinv2.",), "transformers5": ("swinv2.",)}
layouts |= dict.fromkeys(("timm", "torchvision", "original"), ("",))
# timm's Swin V2 reads qkv.weight instead of calling qkv: an adapter would do nothing there
adapter_layouts = ("transformers5", "transformers4")
ignored, optional = swin_files.ignored + r"|\.k_bias$", swin_files.optional
preprocess, notes = swin_files.preprocess, swin_files.notes

COSINE = {"attn.logit_scale": "attn.logit_scale", "attn.cpb_mlp.0": "attn.cpb_mlp.0"}
PARTS = {
    layout: {ours: theirs for ours, theirs in parts.items() if not ours.endswith("table")} | COSINE
    for layout, parts in swin_files.PARTS.items()
}
PARTS["transformers4"] |= {
    "attn.logit_scale": "attention.self.logit_scale",
    "attn.cpb_mlp.0": "attention.self.continuous_position_bias_mlp.0",
}
# transformers 5 left the names of this family as they were
PARTS["transformers5"] = PARTS["transformers4"]


def config_for(name: str) -> SwinV2Config | None:
    """swinv2-{size}-patch{p}-window{w}-{side}; after fine-tuning at a larger size
    window12to24-192to384.

    Window 24 exists only as fine-tuned from window 12 at 192 pixels, so it means that
    without saying so.
    """
    pattern = rf"swinv2-({'|'.join(SIZES)})-patch(\d+)-window(?:(\d+)to)?(\d+)-(?:(\d+)to)?(\d+)"
    match = re.fullmatch(pattern, name)
    if not match:
        return None
    dim, depths, heads = SIZES[match[1]]
    patch, window, side = int(match[2]), int(match[4]), int(match[6])
    before = int(match[3] or (12 if window == 24 else 0))
    grid = int(match[5] or 192) // patch
    pretrained = tuple(min(before, grid >> stage) for stage in range(len(depths)))
    sizes = {"dim": dim, "depths": depths, "heads": heads, "patch_size": patch, "window": window}
    return SwinV2Config(name=name, image_size=side, pretrained_windows=pretrained, **sizes)


def names() -> list[str]:
    plain = [f"swinv2-{size}-patch4-window{w}-256" for size in ("tiny", "small", "base") for w in (8, 16)]
    first = [f"swinv2-{size}-patch4-window12-192" for size in ("base", "large")]
    tuned = [
        f"swinv2-{size}-patch4-window12to{w}-192to{side}"
        for size in ("base", "large")
        for w, side in ((16, 256), (24, 384))
    ]
    return ["swinv2-nano-patch4-window6-48", *plain, *first, *tuned]


def key_table(config: SwinV2Config, layout: str) -> list[Entry]:
    """Our names beside those of transformers, timm, torchvision and the original repository."""
    table = stem(config, layout, "swinv2.")
    for ours, theirs in block_names(config, layout, "swinv2."):
        table += block(ours, theirs, PARTS[layout])
        network = PARTS[layout]["attn.cpb_mlp.0"].removesuffix("0")
        table += linear(f"{ours}.attn.cpb_mlp.2", f"{theirs}.{network}2", bias=False)
        if layout not in ("transformers4", "transformers5"):
            table += fused([f"{ours}.attn.{name}_proj" for name in "qkv"], f"{theirs}.attn.qkv.weight")
            biases = tuple(f"{ours}.attn.{name}_proj.bias" for name in "qv")
            if layout == "torchvision":  # stores a key bias, and sets it to zero before use
                table += [Entry(biases, f"{theirs}.attn.qkv.bias", "cat_without_k")]
            else:
                table += [rename(b, f"{theirs}.attn.{n}_bias") for b, n in zip(biases, "qv", strict=True)]
    return table


def fit_config(config: SwinV2Config, shapes: dict[str, tuple]) -> SwinV2Config:
    """The configuration with what a file's shapes (our names) say of it: classes,
    absolute positions."""
    classes = shapes["head.weight"][0] if "head.weight" in shapes else 0
    return replace(config, num_classes=classes, absolute_positions="pos_embed" in shapes)


def adapt(state: dict[str, Tensor], old: SwinV2Config, new: SwinV2Config) -> None:
    """Interpolate absolute positions in `state`, in place; the position network needs
    no interpolation."""
    adapt_positions(state, old, new, prefix=0)


TIMM_ARGUMENTS = swin_files.TIMM_ARGUMENTS | {"pretrained_window_sizes": "pretrained_windows"}


def config_from_json(data: dict) -> SwinV2Config | None:
    """Read transformers' or timm's config.json; None where it is of another family."""
    if "model_type" not in data:
        name = re.sub(r"^(swinv2-\w+)-window", r"\1-patch4-window", timm_name(data))
        return with_timm_arguments(config_for(name), data, TIMM_ARGUMENTS, (("global_pool", "avg"),))
    if data["model_type"] != "swinv2":
        return None
    config = swin_files.from_transformers(SwinV2Config(), data)
    pretrained = data.get("pretrained_window_sizes") or (0,) * len(config.depths)
    return replace(config, pretrained_windows=tuple(pretrained))


def config_to_json(config: SwinV2Config, layout: str) -> dict:
    """config.json as transformers or timm read it; labels and preprocessing are
    added by the caller."""
    if layout == "timm":
        known = config.name in names()[1:]
        name = config.name.replace("-", "_").replace("_patch4", "") if known else "swinv2_tiny_window8_256"
        return to_timm(config, name, TIMM_ARGUMENTS, swin_files.last_width(config))
    data = swin_files.to_transformers(config, "Swinv2")
    return data | {"pretrained_window_sizes": list(config.pretrained_windows)}
