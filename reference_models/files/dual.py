"""The files of dual encoders: transformers' VisionTextDualEncoderModel, whose towers are a ViT and
a BERT, and SiglipModel; open_clip's are in open_clip.py. See load.py for the protocol.

The first takes from each tower what its library calls pooler_output: of BertModel and ViTModel
tanh(W x + b), of Dinov2Model the class token after the last norm. So a ViT without pooler is
written as a Dinov2Model whose layer scales are 1, which computes the same.
"""

import re
from dataclasses import replace
from functools import partial

from torch import nn

from reference_models.clip import CLIPConfig
from reference_models.dual import DualConfig, DualEncoder
from reference_models.errors import ModelError
from reference_models.files import bert, bert_variants, clip, open_clip, vit, vit_variants
from reference_models.files.names import Entry, linear, rename, under
from reference_models.files.open_clip import TEXTS
from reference_models.files.timm_vit import SIZES
from reference_models.files.towers import text_rows, vision_rows
from reference_models.vit import ViTConfig

layouts = {"transformers4": ("",), "transformers5": ("",), "open_clip": ("", "text.")}
ignored = r"position_ids$|\.mask_token$|^vision_model\.classifier\.|^(text\.)?attn_mask$"
build, adapter_layouts = DualEncoder, ("transformers5", "transformers4")
SIGLIPS = ("base-patch16-224", "large-patch16-256", "so400m-patch14-384")
names = ["dual-nano", *(f"{kind}-{size}" for kind in ("siglip", "siglip2") for size in SIGLIPS)]


def join(vision: nn.Module, text: nn.Module, embed_dim: int = DualConfig.embed_dim) -> DualEncoder:
    """A dual encoder of two loaded models, of CLIP the tower that is meant, with new projections;
    the first one's preprocessing."""
    config = DualConfig("dual", vision.config, text.config, embed_dim)
    model = DualEncoder(config, getattr(vision, "vision", vision), getattr(text, "text", text))
    model.layouts, model.key_table = adapter_layouts, partial(key_table, model.config)
    model.preprocess, model.labels, model.notes = model.vision.preprocess, None, []
    return model


def config_for(name: str) -> DualConfig | None:
    """dual-nano, or a SigLIP such as siglip2-base-patch16-224."""
    if name == "dual-nano":
        vision = replace(vit.config_for("vit-nano-patch8-48"), num_classes=0)
        return DualConfig(name, vision, bert.config_for("bert-nano"))
    if not (match := re.fullmatch(r"siglip(2?)-(base|large|so400m)-patch(\d+)-(\d+)", name)):
        return None
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = dict(zip(keys, SIZES[match[2]], strict=True))
    vision = sizes | {"patch_size": int(match[3]), "image_size": int(match[4])}
    text = sizes | {"vocab_size": 256000 if match[1] else 32000}
    return replace(_read_siglip({"text_config": text, "vision_config": vision}), name=name)


def key_table(config: DualConfig, layout: str) -> list[Entry]:
    """Our names beside open_clip's, SiglipModel's or VisionTextDualEncoderModel's; no row for a
    tower that has no counterpart there."""
    if layout == "open_clip":
        return open_clip.key_table(config)
    if is_siglip(config):
        table = [rename(name, name, "scalar") for name in ("logit_scale", "logit_bias")]
        table += under("vision.", "", vision_rows(config.vision.depth, "vision_model.", "siglip"))
        table += under("text.", "", text_rows(config.text.text_depth, "text_model.", "clip"))
        return table + linear("text_projection", "text_model.head")
    table = [rename(name, name) for name in ("visual_projection.weight", "text_projection.weight", "logit_scale")]
    if config.vision.family == "vit":
        own = vit.key_table(config.vision, layout) if config.vision.pooler else _dinov2_rows(config.vision, layout)
        table += under("vision.", "vision_model.", own, "vit.")
    if config.text.family in TEXTS:
        table += under("text.", "text_model.", TEXTS[config.text.family].key_table(config.text, layout))
    return table


def _dinov2_rows(config: ViTConfig, layout: str) -> list[Entry]:
    """Our ViT beside Dinov2Model, whose layer scales must be ones."""
    return [
        rename(re.sub(r"gamma_(\d)$", r"norm\1.weight", row.ours[0]), row.theirs, "ones")
        if ".gamma_" in row.ours[0]
        else row
        for row in vit_variants.dinov2_rows(config, "", layout)
    ]


def fit_config(config: DualConfig, shapes: dict[str, tuple]) -> DualConfig:
    """With what the shapes say of the towers: poolers, and of a picture tower of another library
    its options and how many blocks it has."""
    vision = {key.removeprefix("vision."): shape for key, shape in shapes.items() if key.startswith("vision.")}
    if config.vision.family == "vit_variants" or config.trunk:
        tower = open_clip.PICTURES[config.vision.family].fit_config(config.vision, vision)
        if config.trunk and hasattr(tower, "depth"):
            tower = replace(tower, depth=len({key.split(".")[1] for key in vision if key.startswith("blocks.")}))
        config = replace(config, vision=tower)
    has = {tower: f"{tower}.pooler.dense.weight" in shapes for tower in ("vision", "text")}
    towers = {t: getattr(config, t) for t in has if hasattr(getattr(config, t), "pooler")}
    return replace(config, **{tower: replace(one, pooler=has[tower]) for tower, one in towers.items()})


def config_from_json(data: dict) -> DualConfig | None:
    if isinstance(data.get("model_cfg"), dict):
        return open_clip.read(data["model_cfg"])
    if data.get("model_type") == "siglip":
        return _read_siglip(data)
    if data.get("model_type") != "vision-text-dual-encoder":
        return None
    vision, text = data.get("vision_config") or {}, data.get("text_config") or {}
    kind = vision.get("model_type")
    if kind == "dinov2" and vision.get("layerscale_value", 1.0) == 1.0:
        vision = vision | {"model_type": "vit"} | {"intermediate_size": vision["hidden_size"] * vision["mlp_ratio"]}
    texts = (family.config_from_json(text) for family in TEXTS.values())
    towers = vit.config_from_json(vision), next((config for config in texts if config is not None), None)
    for tower, config in zip(("vision", "text"), towers, strict=True):
        if config is None:
            kind = (data.get(f"{tower}_config") or {}).get("model_type")
            known = "vit, dinov2" if tower == "vision" else ", ".join(("bert", *bert_variants.CLASSES))
            raise ModelError(f"config.json: a dual encoder with a {tower} tower {kind!r} is not supported: {known}")
    vision = replace(towers[0], num_classes=0, pooler=kind != "dinov2")
    sizes = data.get("projection_dim", 512), data.get("logit_scale_init_value", 2.6592)
    return DualConfig("dual", vision, towers[1], *sizes)


def _read_siglip(data: dict) -> DualConfig:
    """transformers' SiglipModel, whose projections stand in its towers."""
    text = data.get("text_config") or {}
    vision, sizes = (vit_variants.read_tower(one, "siglip", 0) for one in (data.get("vision_config") or {}, text))
    values = {f"text_{name}": getattr(sizes, name) for name in clip.FIELDS}
    values |= {"vocab_size": text.get("vocab_size", 32000), "context": text.get("max_position_embeddings", 64)}
    tower = CLIPConfig("siglip-text", text_pool="last", text_causal=False, family="clip_text", **values)
    width = text.get("projection_size") or sizes.dim
    return DualConfig(vision.name, vision, tower, width, logit_bias=-10.0, vision_proj="none", text_proj="bias")


def config_to_json(config: DualConfig, layout: str) -> dict:
    """ModelError for towers that transformers does not know so."""
    if layout == "open_clip":
        raise ModelError(
            f"{config.name}: open_clip's files of such a model are read, not written; use layout 'minilora'"
        )
    text, pooling = config.text, getattr(config.text, "pooling", "pooler")
    if is_siglip(config):
        return _siglip_json(config)
    if config.vision.family != "vit" or config.vision.distilled or text.family not in TEXTS:
        raise ModelError(f"{config.vision.name} and {text.name}: VisionTextDualEncoderModel is written with a ViT and "
                         "a BERT; use layout 'minilora'")  # fmt: skip
    if pooling != "pooler" or not text.pooler:
        raise ModelError(
            f"{text.name}: VisionTextDualEncoderModel takes the pooler's vector of a text, this model "
            f"{'[CLS]' if pooling in ('pooler', 'cls') else 'the ' + pooling + ' of the tokens'}; use layout 'minilora'"
        )
    vision = vit.config_to_json(config.vision, layout)
    if not config.vision.pooler:
        vision |= {"architectures": ["Dinov2Model"], "model_type": "dinov2", "layerscale_value": 1.0}
        whole, rest = divmod(config.vision.hidden, config.vision.dim)
        vision |= {"mlp_ratio": config.vision.hidden / config.vision.dim if rest else whole, "use_mask_token": False}
    return {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": "vision-text-dual-encoder",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.logit_scale,
        "vision_config": vision,
        "text_config": TEXTS[text.family].config_to_json(text, layout),
    }


def is_siglip(config: DualConfig) -> bool:
    """Whether transformers' SiglipModel computes the same."""
    text, joined = config.text, (config.vision_proj, config.text_proj, config.logit_bias is not None)
    towers = text.family == "clip_text" and config.vision.family == "vit_variants" and joined == ("none", "bias", True)
    pooled = towers and (text.pooled_at, text.text_causal) == ("last", False)
    return pooled and vit_variants.kind_of(config.vision) == "siglip"


def _siglip_json(config: DualConfig) -> dict:
    text = {theirs: getattr(config.text, f"text_{ours}") for ours, (theirs, *_) in clip.FIELDS.items()}
    text |= {"vocab_size": config.text.vocab_size, "max_position_embeddings": config.text.context}
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": vit_variants.config_to_json(config.vision, "transformers4"),
        "text_config": text | {"model_type": "siglip_text_model", "projection_size": config.embed_dim},
    }
