"""The files of ViT variants: DINOv2, the picture towers of CLIP and SigLIP, distilled DeiT, timm's
variants. See load.py for the protocol.
"""

import re
from dataclasses import replace

from reference_models.clip import CLIPConfig
from reference_models.errors import ModelError
from reference_models.files import clip, vit
from reference_models.files.fields import ENCODER_FIELDS as FIELDS
from reference_models.files.fields import NO_DROPOUT, read_fields, size_name, write_fields
from reference_models.files.names import BLOCK, OUTSIDE, Entry, blocks, linear, rows
from reference_models.files.preprocess import HALF, IMAGENET
from reference_models.files.shapes import adapt_positions, fit_positions
from reference_models.files.timm_vit import SIZES, head_rows, timm_json, timm_rows, with_swiglu
from reference_models.files.towers import vision_rows
from reference_models.vit import ViTConfig
from reference_models.vit_variants import VariantConfig, VariantViT

build, adapt = VariantViT, adapt_positions
PREFIXES = ("dinov2.", "dinov2_with_registers.", "deit.", "vision_model.")
layouts = {"transformers4": PREFIXES, "transformers5": (*PREFIXES, ""), "timm": ("",), "open_clip": ("",)}
own_prefixes = ("", "vision.")  # of our own CLIP files
adapter_layouts = ("transformers5", "transformers4", "timm")
# tokens of pretraining, and what else is in the file of a CLIP or SigLIP
ignored = (
    r"mask_token$|position_ids$|^(text(_model)?\.|(visual|text)_projection|logit_(scale|bias)$)|"
    r"^(transformer\.|token_embedding\.|positional_embedding$|ln_final\.|visual\.proj$|attn_mask$|"
    r"input_resolution$|context_length$|vocab_size$)"
)
optional = r"^(head|norm|attn_pool)\."  # parts that another pooling leaves out
preprocess = {**IMAGENET, "interpolation": "bicubic", "resize": "shortest"}

DINOV2 = {"pool": "norm token", "head_pool": "norm token+avg", "layer_scale": 1.0}
CLIP = {"pool": "norm token", "head_pool": "avg", "pre_norm": True}
SIGLIP = {"pool": "norm map", "head_pool": "norm avg", "class_token": False, "prefix_positions": 0}
DEIT = {"distilled": True, "prefix_positions": 2, "num_classes": 1, "distilled_classes": 1}
CLIP_DEFAULTS = {"patch_size": 32, "act": "quick_gelu", "eps": 1e-5}
SIGLIP_DEFAULTS = {"act": "gelu_pytorch_tanh", "eps": 1e-6}
names = [f"dinov2{kind}-{size}" for kind in ("", "-registers") for size in ("small", "base", "large", "giant")]


def config_for(name: str) -> VariantConfig | None:
    """dinov2-base or dinov2-registers-base, as published for 518 pixels."""
    match = re.fullmatch(r"dinov2(-registers)?-(small|base|large|giant)", name)
    if not match:
        return None
    size = "giant_dino" if match[2] == "giant" else match[2]
    sizes = dict(zip(("dim", "depth", "heads", "hidden"), SIZES[size], strict=True))
    sizes |= {"patch_size": 14, "image_size": 518, "swiglu": match[2] == "giant"}
    return VariantConfig(name=name, registers=4 if match[1] else 0, **sizes, **DINOV2)


def tower_of(config: CLIPConfig) -> VariantConfig:
    """The picture tower of a CLIP, with the head that transformers gives it."""
    values = {name: getattr(config, f"vision_{name}") for name in ("dim", "depth", "heads", "hidden", "act", "eps")}
    sizes = {"image_size": config.image_size, "patch_size": config.patch_size, "num_classes": 0}
    return VariantConfig(config.name, **values, **sizes, **CLIP)


def preprocess_of(config: VariantConfig) -> dict:
    """What a checkpoint wants that does not say it: CLIP's and SigLIP's towers have their own."""
    if config.pre_norm:
        return clip.preprocess
    return preprocess | HALF | {"resize": "squash"} if "map" in config.pool else preprocess


def lone_file(config: VariantConfig, keys, file_name: str, layout: str) -> tuple[dict, list[str]]:
    """The activation of a CLIP's file without config.json, as files/clip.py tells it."""
    if not config.pre_norm:
        return {}, []
    told, notes = clip.lone_file(config, keys, file_name, layout)
    return {"act": told["vision_act"]}, notes


def kind_of(config: VariantConfig) -> str | None:
    """Which model of transformers computes the same, with or without a head; None for none."""
    options = {"layer_scale": bool(config.layer_scale), "swiglu": config.swiglu, "pre_norm": config.pre_norm}
    options |= {"class_token": config.class_token, "registers": config.registers > 0, "distilled": config.distilled}
    set_ = {key for key, value in options.items() if value}
    if config.prefix_positions != (2 if config.distilled else int(config.class_token)):
        return None
    steps = " ".join(config.steps)
    if set_ == {"class_token", "distilled"}:
        return "deit"
    for kind, said, needs in (
        ("dinov2", DINOV2, {"class_token", "layer_scale"}),
        ("clip", CLIP, {"class_token", "pre_norm"}),
        ("siglip", SIGLIP, set()),
    ):
        extra = {"swiglu", "registers"} if kind == "dinov2" else set()
        if needs == set_ - extra and steps == said["head_pool" if config.num_classes else "pool"]:
            return "dinov2_with_registers" if "registers" in set_ else kind
    return None


def key_table(config: VariantConfig, layout: str) -> list[Entry]:
    """No rows where the library has no such model."""
    if layout == "timm":
        return timm_rows(config)
    kind = kind_of(config)
    if layout == "open_clip":
        norm = "norm" if config.steps[0] == "norm" else "fc_norm"
        return vision_rows(config.depth, "visual.", layout, norm, {f"gamma_{n}": f"ls_{n}.gamma" for n in (1, 2)})
    if kind in ("clip", "siglip"):
        # without a head transformers 5 has no level above the tower
        base = "vision_model." if config.num_classes or layout == "transformers4" else ""
        return vision_rows(config.depth, base, kind) + linear("head", "classifier")
    if kind == "deit":
        return vit.key_table(config, layout) + head_rows(config, "cls_classifier", "distillation_classifier")
    if kind is None:
        return []
    table = dinov2_rows(config, f"{kind}.", layout, config.swiglu) + linear("head", "classifier")
    return table + rows("", f"{kind}.", {"reg_token": "embeddings.register_tokens"})


def dinov2_rows(config: ViTConfig, base: str, layout: str, swiglu: bool = False) -> list[Entry]:
    """Our names beside those of transformers' Dinov2Model."""
    parts = {name: theirs for name, theirs in BLOCK[layout].items() if name.startswith("attn.")}
    parts |= {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
    packed: dict = {}
    if swiglu and layout == "transformers4":
        parts, packed = with_swiglu(config, parts | {"mlp.fc2": "mlp.weights_out"}, "mlp.weights_in.")
    elif swiglu:
        parts |= {"mlp.gate_proj": "mlp.gate_proj", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    parts |= {"gamma_1": "layer_scale1.lambda1", "gamma_2": "layer_scale2.lambda1"}
    return rows("", base, OUTSIDE) + blocks(config.depth, f"{base}encoder.layer.", parts, packed)


def fit_config(config: VariantConfig, shapes: dict[str, tuple]) -> VariantConfig:
    """With its classes, layer scale, biases, place of the final norm, and picture size."""
    heads = [shapes[key][0] for key in ("head.weight", "head.token.weight") if key in shapes]
    scale = (config.layer_scale or 1e-5) if "blocks.0.gamma_1" in shapes else 0.0
    config = replace(config, num_classes=heads[0] if heads else 0, layer_scale=scale)
    config = replace(config, distilled_classes=config.num_classes if "head.dist.weight" in shapes else 0)
    config = replace(config, qkv_bias="blocks.0.attn.q_proj.bias" in shapes)
    if "fc_norm.weight" in shapes and config.pool.startswith("norm "):
        config = replace(config, pool=" ".join(reversed(config.pool.split())))
    return fit_positions(config, shapes, config.prefix_positions)


def config_from_json(data: dict) -> VariantConfig | None:
    """Read transformers' config.json of a DINOv2, a distilled DeiT or a picture tower; None where
    it is of another family. timm's are read by files/vit.py."""
    kind, architectures = data.get("model_type"), " ".join(data.get("architectures") or ())
    classes = int("ForImageClassification" in architectures)
    if kind in ("dinov2", "dinov2_with_registers"):
        return _read_dinov2(data, classes)
    if kind == "deit" and "DeiTForImageClassificationWithTeacher" in architectures:
        values = read_fields(data, FIELDS)
        return VariantConfig(size_name("deit", values), **values, **DEIT)
    if kind in ("clip_vision_model", "siglip_vision_model") or (kind in ("clip", "siglip") and classes):
        tower = data.get("vision_config_dict") or data.get("vision_config") or {} if classes else data
        return read_tower(tower, "clip" if kind.startswith("clip") else "siglip", classes)
    return None


def read_tower(data: dict, kind: str, classes: int) -> VariantConfig:
    options, defaults = (CLIP, CLIP_DEFAULTS) if kind == "clip" else (SIGLIP, SIGLIP_DEFAULTS)
    values = read_fields(data, {ours: (name, defaults.get(ours, default)) for ours, (name, default) in FIELDS.items()})
    if data.get("vision_use_head") is False:
        options = options | {"pool": "norm avg"}
    return VariantConfig(size_name(kind, values), num_classes=classes, **values, **options)


def _hidden(dim: int, ratio: float, swiglu: bool) -> int:
    """The width of a DINOv2's MLP: of SwiGLU two thirds, rounded up to a multiple of 8."""
    return (int(int(dim * ratio) * 2 / 3) + 7) // 8 * 8 if swiglu else int(dim * ratio)


def _read_dinov2(data: dict, classes: int) -> VariantConfig:
    values = read_fields(data, FIELDS | {"eps": ("layer_norm_eps", 1e-6), "qkv_bias": ("qkv_bias", True)})
    swiglu = data.get("use_swiglu_ffn", False)
    values["hidden"] = _hidden(values["dim"], data.get("mlp_ratio", 4), swiglu)
    registers = data.get("num_register_tokens", 4) if data["model_type"].endswith("registers") else 0
    options = {**DINOV2, "registers": registers, "swiglu": swiglu, "layer_scale": data.get("layerscale_value", 1.0)}
    return VariantConfig(size_name("dinov2", values), num_classes=classes, **values, **options)


def config_to_json(config: VariantConfig, layout: str) -> dict:
    """ModelError where the library has no such model."""
    if layout == "timm":
        return timm_json(config)
    kind, head = kind_of(config), "ForImageClassification" if config.num_classes else "Model"
    if kind is None or layout == "open_clip":
        raise ModelError(f"{config.name}: {layout} has no model with its options; save it with layout='minilora'")
    if kind == "deit":
        cls, fields = "DeiT" + head + "WithTeacher" * ("pair" in config.steps), FIELDS
        return {"architectures": [cls], "model_type": kind, **write_fields(config, fields), **NO_DROPOUT}
    if kind in ("clip", "siglip"):
        tower = {"model_type": f"{kind}_vision_model", **write_fields(config, FIELDS)}
        cls = {"clip": "CLIP", "siglip": "Siglip"}[kind]
        if not config.num_classes:
            return {"architectures": [f"{cls}VisionModel"], **tower}
        return {"architectures": [cls + head], "model_type": kind, "vision_config": tower}
    cls = "Dinov2" + "WithRegisters" * (config.registers > 0)
    data = {"architectures": [cls + head], "model_type": kind, **write_fields(config, FIELDS), **NO_DROPOUT}
    ratio = next((n for n in range(1, 65) if _hidden(config.dim, n, config.swiglu) == config.hidden), None)
    if ratio is None:
        raise ModelError(f"{config.name}: transformers' DINOv2 is a whole number of widths wide, not {config.hidden}")
    data |= {"mlp_ratio": ratio, "qkv_bias": config.qkv_bias, "use_swiglu_ffn": config.swiglu}
    data["layerscale_value"] = config.layer_scale
    return data | ({"num_register_tokens": config.registers} if config.registers else {})
