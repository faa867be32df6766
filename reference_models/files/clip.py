"""The files of CLIP checkpoints, of transformers and of open_clip. See load.py for the protocol."""

import re
from functools import partial

from reference_models.clip import CLIP, CLIPConfig
from reference_models.errors import ModelError
from reference_models.files.names import Entry, rename, under
from reference_models.files.preprocess import OPENAI
from reference_models.files.shapes import adapt_positions, fit_positions
from reference_models.files.towers import text_rows, vision_rows

build = CLIP
# no adapter in open_clip's, which reads the weights of its projections and never calls them
layouts = {"transformers4": ("",), "transformers5": ("",), "open_clip": ("",)}
# position_ids: a buffer of old transformers; the three numbers: OpenAI's own files
ignored = r"position_ids$|^(input_resolution|context_length|vocab_size)$"
preprocess = {**OPENAI, "interpolation": "bicubic", "resize": "shortest"}
adapt = partial(adapt_positions, key="vision.pos_embed")

#        e, patch, vision (d, depth, heads, hidden), text (d, depth, heads, hidden)
SIZES = {
    "clip-vit-b-32": (512, 32, (768, 12, 12, 3072), (512, 12, 8, 2048)),
    "clip-vit-b-16": (512, 16, (768, 12, 12, 3072), (512, 12, 8, 2048)),
    "clip-vit-l-14": (768, 14, (1024, 24, 16, 4096), (768, 12, 12, 3072)),
    "clip-nano": (64, 8, (128, 4, 4, 512), (128, 2, 4, 512)),
}
TOWER = ("dim", "depth", "heads", "hidden")
NANO = {"image_size": 48, "vocab_size": 4000}
names = list(SIZES)


def config_for(name: str) -> CLIPConfig | None:
    """With "-quickgelu" behind the name OpenAI's activation, as open_clip calls it."""
    base = name.removesuffix("-quickgelu")
    if base not in SIZES:
        return None
    embed, patch, vision, text = SIZES[base]
    act = "quick_gelu" if base != name else "gelu"
    towers = {}
    for tower, sizes in (("vision", vision), ("text", text)):
        towers |= {f"{tower}_{key}": value for key, value in zip(TOWER, sizes, strict=True)}
        towers[f"{tower}_act"] = act
    nano = NANO if base == "clip-nano" else {}
    return CLIPConfig(name=name, embed_dim=embed, patch_size=patch, **towers, **nano)


def key_table(config: CLIPConfig, layout: str) -> list[Entry]:
    """Our names beside transformers' (4 and 5 alike) or open_clip's."""
    open_clip = layout == "open_clip"
    kind, vision, text = ("open_clip", "visual.", "") if open_clip else ("clip", "vision_model.", "text_model.")
    table = [rename("logit_scale", "logit_scale")]
    for ours, theirs in (("visual_projection", "visual.proj"), ("text_projection", "text_projection")):
        weight = f"{ours}.weight"
        table += [rename(weight, theirs, "transpose") if open_clip else rename(weight, weight)]
    table += under("vision.", "", vision_rows(config.vision_depth, vision, kind))
    return table + under("text.", "", text_rows(config.text_depth, text, kind))


def lone_file(config: CLIPConfig, keys, file_name: str, layout: str) -> tuple[dict, list[str]]:
    """The activation of a file without config.json: OpenAI's where its own keys or the name tell,
    or where transformers' default is that; else as the model's name says, and a note."""
    openai = {"input_resolution", "context_length", "vocab_size"} <= {*keys}
    quick = openai or re.search("quick[-_]?gelu", file_name + config.name, re.IGNORECASE)
    act = "quick_gelu" if quick or layout.startswith("transformers") else "gelu"
    other = {
        "gelu": "quick_gelu (--model with -quickgelu behind its name)",
        "quick_gelu": "gelu (say it in config.json)",
    }
    note = f"activation {act}: assumed, {file_name} does not say; the other one is {other[act]}"
    return {"vision_act": act, "text_act": act}, [] if quick else [note]


def fit_config(config: CLIPConfig, shapes: dict[str, tuple]) -> CLIPConfig:
    return fit_positions(config, shapes, prefix=1, key="vision.pos_embed")


# ours: (transformers' name in vision_config or text_config, default of vision, default of text)
FIELDS = {
    "dim": ("hidden_size", 768, 512),
    "depth": ("num_hidden_layers", 12, 12),
    "heads": ("num_attention_heads", 12, 8),
    "hidden": ("intermediate_size", 3072, 2048),
    "act": ("hidden_act", "quick_gelu", "quick_gelu"),
    "eps": ("layer_norm_eps", 1e-5, 1e-5),
}


def config_from_json(data: dict) -> CLIPConfig | None:
    """Of transformers, or of open_clip where both towers are CLIP's own."""
    if isinstance(data.get("model_cfg"), dict):
        data = data["model_cfg"]
        other = unknown_keys(data) or not isinstance((data.get("vision_cfg") or {}).get("layers", 12), int)
        return None if other else read_sizes(data)  # files/open_clip.py reads the others
    if data.get("model_type") != "clip":
        return None
    # files of 2022 have the tables under a second name too, which counts, its gaps the defaults
    vision, text = (
        data.get(f"{tower}_config_dict") or data.get(f"{tower}_config") or {} for tower in ("vision", "text")
    )
    towers = {}
    for ours, (theirs, vision_default, text_default) in FIELDS.items():
        towers[f"vision_{ours}"] = vision.get(theirs, vision_default)
        towers[f"text_{ours}"] = text.get(theirs, text_default)
    patch = vision.get("patch_size", 32)
    return CLIPConfig(
        name=f"clip-vit-{towers['vision_dim']}-{patch}",
        embed_dim=data.get("projection_dim", 512),
        image_size=vision.get("image_size", 224),
        patch_size=patch,
        vocab_size=text.get("vocab_size", 49408),
        context=text.get("max_position_embeddings", 77),
        eos_token_id=text.get("eos_token_id", 49407),
        logit_scale=data.get("logit_scale_init_value", 2.6592),
        **towers,
    )


# ours: (open_clip's name, its default)
OPEN_CLIP = {
    "vision_cfg": {
        "image_size": ("image_size", 224),
        "vision_depth": ("layers", 12),
        "vision_dim": ("width", 768),
        "patch_size": ("patch_size", 16),
    },
    "text_cfg": {
        "context": ("context_length", 77),
        "vocab_size": ("vocab_size", 49408),
        "text_dim": ("width", 512),
        "text_heads": ("heads", 8),
        "text_depth": ("layers", 12),
    },
}
# what an open_clip_config.json may set that makes no other model than this one, beside sizes
SIZED = {"layers", "width", "mlp_ratio"}
KNOWN = {
    "vision_cfg": SIZED | {"image_size", "head_width", "patch_size", "patch_dropout"},
    "text_cfg": SIZED | {"context_length", "vocab_size", "heads", "pool_type", "eos_id", "no_causal_mask", "pad_id"}
    | {"hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"},
    "model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"},
}  # fmt: skip


def unknown_keys(data: dict, known: dict[str, set[str]] = KNOWN) -> list[str]:
    """The keys that are set and not known, with their tables' names."""
    tables = {"model_cfg": data} | {name: data.get(name) or {} for name in known if name != "model_cfg"}
    return [
        f"{name}.{key}"
        for name, table in tables.items()
        for key, value in table.items()
        if value not in (None, False) and key not in known[name]
    ]


def read_sizes(data: dict) -> CLIPConfig:
    """The configuration of open_clip's model_cfg, if both towers are CLIP's own."""
    vision, text = (data.get(table) or {} for table in OPEN_CLIP)
    sizes = {
        ours: (data.get(table) or {}).get(theirs, default)
        for table, known in OPEN_CLIP.items()
        for ours, (theirs, default) in known.items()
    }
    act = "quick_gelu" if data.get("quick_gelu") else "gelu"
    pool = text.get("pool_type", "argmax")
    eos = 2 if pool == "argmax" else text.get("eos_id", 2)
    return CLIPConfig(
        name=f"clip-vit-{sizes['vision_dim']}-{sizes['patch_size']}",
        **sizes,
        embed_dim=data.get("embed_dim", 512),
        vision_heads=sizes["vision_dim"] // vision.get("head_width", 64),
        vision_hidden=int(sizes["vision_dim"] * vision.get("mlp_ratio", 4.0)),
        vision_act=act,
        text_hidden=int(sizes["text_dim"] * text.get("mlp_ratio", 4.0)),
        text_act=act,
        eos_token_id=eos,
        text_pool="" if pool == ("argmax" if eos == 2 else "eos") else pool,
        text_causal=not text.get("no_causal_mask", False),
    )


def config_to_json(config: CLIPConfig, layout: str) -> dict:
    if layout == "open_clip":
        return {"model_cfg": _to_open_clip(config)}
    eos = 2 if config.pooled_at == "argmax" else config.eos_token_id
    if config.fill or config.pooled_at == "first" or (config.pooled_at, eos) == ("eos", 2):
        raise ModelError(f"{config.name}: transformers' CLIP pools texts in another way; use layout 'minilora'")
    vision = {theirs: getattr(config, f"vision_{ours}") for ours, (theirs, *_) in FIELDS.items()}
    text = {theirs: getattr(config, f"text_{ours}") for ours, (theirs, *_) in FIELDS.items()}
    vision |= {"model_type": "clip_vision_model", "image_size": config.image_size}
    vision |= {"patch_size": config.patch_size, "num_channels": 3, "projection_dim": config.embed_dim}
    text |= {"model_type": "clip_text_model", "vocab_size": config.vocab_size}
    text |= {"max_position_embeddings": config.context, "projection_dim": config.embed_dim}
    text |= {"eos_token_id": eos, "bos_token_id": None, "pad_token_id": None}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.logit_scale,
        "vision_config": vision,
        "text_config": text,
    }


def _to_open_clip(config: CLIPConfig) -> dict:
    vision, text = (
        {theirs: getattr(config, ours) for ours, (theirs, _) in known.items()} for known in OPEN_CLIP.values()
    )
    vision |= {"head_width": config.vision_dim // config.vision_heads}
    vision |= {"mlp_ratio": config.vision_hidden / config.vision_dim}
    text |= {"mlp_ratio": config.text_hidden / config.text_dim}
    # the last id is also the largest one
    if config.pooled_at != "argmax" and (config.pooled_at, config.eos_token_id) != ("eos", config.vocab_size - 1):
        text |= {"pool_type": config.pooled_at, "eos_id": config.eos_token_id}
    text |= {} if config.text_causal else {"no_causal_mask": True}
    result = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text}
    return {**result, "quick_gelu": True} if config.vision_act == "quick_gelu" else result
