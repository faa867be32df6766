"""Files of timm's vision transformers: the architecture's name and its arguments in config.json, as
a configuration of vit.py or vit_variants.py, and the names of the variants' tensors.

A name is a size, a patch, and words: vit_medium_patch16_reg4_gap_256. Only what changes the
mathematics is read; layer scale, biases and the place of the final norm are seen in the file.
"""

import re
from dataclasses import fields

from reference_models.errors import ModelError
from reference_models.files.names import BLOCK, PACKED, Entry, blocks, linear, rows
from reference_models.files.timm import ENCODER_ARGUMENTS, check_arguments, given, to_timm
from reference_models.vit import ViTConfig
from reference_models.vit_variants import VariantConfig

#             width depth heads hidden
SIZES = {
    "tiny": (192, 12, 3, 768),
    "xsmall": (256, 10, 4, 1024),
    "wee": (256, 14, 4, 1280),
    "little": (320, 14, 5, 1792),
    "small": (384, 12, 6, 1536),
    "medium": (512, 12, 8, 2048),
    "mediumd": (512, 20, 8, 2048),
    "betwixt": (640, 12, 10, 2560),
    "base": (768, 12, 12, 3072),
    "base_plus": (896, 12, 14, 3584),
    "so150m": (896, 18, 14, 2304),
    "so150m2": (832, 21, 13, 2176),
    "large": (1024, 24, 16, 4096),
    "intern300m": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "giantopt": (1536, 40, 16, 6144),
    "giant_dino": (1536, 40, 24, 4096),
    "giant_radio": (1536, 40, 24, 6144),
    "gigantic": (1664, 48, 16, 8192),
}
NAME = re.compile(
    r"(vit|deit3?|eva(?=_large))_([a-z]+\d*m?2?)(_distilled)?_patch(\d+)((?:_[a-z0-9]+)*?)(?:_(\d+))?(_miil)?"
)
WORDS = r"gap|map|clip|quickgelu|siglip|dinov2|tipsv2|plus|miil|distilled|radio|v[34]|reg\d+|36x1"
# what the size does not say
ODD = {"vit_base_patch16_gap_224": {"heads": 16}, "vit_small_patch16_36x1_224": {"depth": 36}}
SIDES = {"dinov2": 518, "tipsv2": 448, "radio": 512}
# siglip's with the tanh form of GELU
TANH = re.compile(r"patch32_siglip|giantopt|large_patch16_siglip(_gap)?_512|so400m_patch16_siglip")
# the arguments that this module reads beside shared.ENCODER_ARGUMENTS
ARGUMENTS = ("mlp_ratio", "act_layer", "class_token", "reg_tokens", "no_embed_class", "pre_norm", "init_values")
ARGUMENTS += ("global_pool", "fc_norm", "final_norm")
POOLS = ("token", "avg", "map")
# ours that timm calls otherwise
ACTS = {"gelu_python": "gelu"}
ACTS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh")


def read_timm(data: dict) -> ViTConfig | VariantConfig | None:
    """The configuration; None where the name is of another family or has a word that is not known.
    ModelError for an argument that is not known."""
    architecture = data.get("architecture", "").split(".")[0]
    match = NAME.fullmatch(architecture)
    if match is None:
        return None
    kind, size, patch = match[1], match[2], int(match[4])
    words = {*"".join(match[i] or "" for i in (3, 5, 7)).split("_")} - {""}
    size += "_plus" * ("plus" in words)
    if size == "giant" and words & {"dinov2", "tipsv2", "radio"}:
        size += "_radio" if "radio" in words else "_dino"
    if size not in SIZES or not all(re.fullmatch(WORDS, word) for word in words):
        return None
    values = dict(zip(("dim", "depth", "heads", "hidden"), SIZES[size], strict=True))
    values |= {"patch_size": patch, "image_size": int(match[6] or next((SIDES[w] for w in words if w in SIDES), 224))}
    values |= ODD.get(architecture, {})
    values |= {"eps": 1e-5 if "clip" in words else 1e-6, "qkv_bias": "miil" not in words}
    values["act"] = "quick_gelu" if "quickgelu" in words else "gelu_tanh" if TANH.search(architecture) else "gelu"
    said = _said_by_name(kind, size, words)
    arguments = data.get("model_args") or {}
    check_arguments(arguments, {*ENCODER_ARGUMENTS, *ARGUMENTS})
    values |= given(arguments, ENCODER_ARGUMENTS)
    values["act"] = arguments.get("act_layer") or values["act"]
    ratio = arguments.get("mlp_ratio", (1 + said["swiglu"]) * values["hidden"] / SIZES[size][0])
    values["hidden"] = int(values["dim"] * ratio + 1e-6) // (1 + said["swiglu"])
    said |= _said_by_arguments(said, arguments, data.get("global_pool"))
    name = architecture.replace("_", "-")
    variant = VariantConfig(name=name, **values, **said)
    plain = all(said.get(field.name, field.default) == field.default for field in fields(VariantConfig))
    if not plain or words - {"miil"} or kind not in ("vit", "deit") or arguments.get("init_values"):
        return variant
    return ViTConfig(name=re.sub("^deit-", "vit-", name), **values)


def _said_by_name(kind: str, size: str, words: set[str]) -> dict:
    """The options that an architecture's name stands for."""
    siglip, gap = "siglip" in words, "gap" in words
    registers = next((int(word[3:]) for word in words if word.startswith("reg")), 0)
    registers = {"v3": 7, "v4": 9}[min(words & {"v3", "v4"})] if "radio" in words else registers
    pool = "map" if "map" in words or (siglip and not gap) else "avg" if gap or kind == "eva" else "token"
    said = {"registers": registers, "class_token": not (siglip or gap or "map" in words), "pre_norm": "clip" in words}
    said |= {"swiglu": size == "giant_dino", "distilled": "distilled" in words}
    said["pool"] = pool if size == "intern300m" or "radio" in words else f"norm {pool}"
    # where registers have no positions, the class token has none either
    none = registers and not size.startswith("so150m")
    counted = said["class_token"] + said["distilled"] + registers
    said["prefix_positions"] = 0 if none or kind == "deit3" else counted
    return said | {"distilled_classes": 1, "num_classes": 1} if said["distilled"] else said


def _said_by_arguments(said: dict, arguments: dict, pool: str | None) -> dict:
    """The options that config.json gives explicitly; the rest stays as in `said`."""
    known = {"class_token": "class_token", "reg_tokens": "registers", "pre_norm": "pre_norm"}
    changed = said | given(arguments, known)
    if pool := arguments.get("global_pool", pool):
        if pool not in POOLS:
            raise ModelError(f"config.json: global_pool {pool!r} is not known; known are {', '.join(POOLS)}")
        changed["pool"] = f"norm {pool}" if "norm" in said["pool"] else pool
    if arguments.get("final_norm") is False:
        changed["pool"] = changed["pool"].replace("norm", "").strip()
    if {"class_token", "reg_tokens", "no_embed_class"} & arguments.keys():
        without = said["class_token"] + said["registers"] and not said["prefix_positions"]
        spared = arguments.get("no_embed_class", without)
        counted = changed["class_token"] + changed["distilled"] + changed["registers"]
        changed["prefix_positions"] = 0 if spared else counted
    return changed


# ---- the other direction: rows of the key table, config.json


def timm_rows(config: VariantConfig) -> list[Entry]:
    """Our names of a variant beside timm's."""
    same = ("patch_embed.proj", "norm_pre", "cls_token", "dist_token", "reg_token", "pos_embed", "norm", "fc_norm")
    table = rows("", "", {name: name for name in same}) + head_rows(config, "head", "head_dist")
    pool = {"probe": "latent", "q_proj": "q", "out_proj": "proj"}
    pool |= {name: name for name in ("norm", "mlp.fc1", "mlp.fc2")}
    table += rows("attn_pool.", "attn_pool.", pool, {"kv.": ("k_proj", "v_proj")})
    parts = BLOCK["timm"] | {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    return table + blocks(config.depth, "blocks.", *with_swiglu(config, parts, "mlp.fc1.", PACKED["timm"]))


def head_rows(config: VariantConfig, token: str, dist: str) -> list[Entry]:
    """DeiT's own two heads, or one."""
    two = [*linear("head.token", token), *linear("head.dist", dist)]
    return two if "pair" in config.steps else linear("head", token.removeprefix("cls_"))


def with_swiglu(config: VariantConfig, parts: dict, name: str, packed: dict | None = None) -> tuple[dict, dict]:
    """The parts of a block and what is packed in it; of a SwiGLU its gate and fc1, which are one in
    their files, called `name`."""
    if not config.swiglu:
        return parts, packed or {}
    rest = {ours: theirs for ours, theirs in parts.items() if ours != "mlp.fc1"}
    return rest, {**(packed or {}), name: ("mlp.gate_proj", "mlp.fc1")}


def timm_json(config: VariantConfig) -> dict:
    """config.json as timm reads it; ModelError where it has no such model."""
    steps = [step for step in config.steps if step != "norm"]
    none = not config.prefix_positions and config.prefix > 0
    if steps[0] == "token+avg" or config.prefix_positions not in (0, config.prefix):
        raise ModelError(f"{config.name}: timm has no such pooling or positions; save it with layout='transformers'")
    if config.distilled:
        if config.num_classes and config.num_classes != config.distilled_classes:
            raise ModelError(f"{config.name}: timm's distilled models have two heads, this one has one")
        return to_timm(config, "deit_base_distilled_patch16_224", ENCODER_ARGUMENTS, config.dim)
    architecture = "vit_giant_patch14_dinov2" if config.swiglu else "vit_base_patch16_224"
    architecture = "vit_base_patch16_clip_224" if config.eps == 1e-5 else architecture
    data = to_timm(config, architecture, ENCODER_ARGUMENTS, config.dim)
    norm = "norm" in config.steps
    options = {"class_token": config.class_token, "reg_tokens": config.registers, "no_embed_class": none}
    options |= {"pre_norm": config.pre_norm, "init_values": config.layer_scale or None, "global_pool": steps[0]}
    options |= {"fc_norm": config.steps[-1] == "norm", "final_norm": norm}
    options |= {} if config.swiglu else {"act_layer": ACTS.get(config.act, config.act)}
    data["model_args"] |= options | {"mlp_ratio": (1 + config.swiglu) * config.hidden / config.dim}
    return data
