"""open_clip's models whose towers are not CLIP's own two: a picture tower of timm or with
options, a text tower of transformers or with another pooling. Read as a dual encoder.
"""

from dataclasses import replace
from pathlib import Path

from reference_models.clip import CLIPConfig
from reference_models.dual import DualConfig
from reference_models.errors import ModelError
from reference_models.files import bert, bert_variants, clip, swin, swinv2, vit, vit_variants
from reference_models.files.names import Entry, linear, rename, under
from reference_models.files.refused import instead
from reference_models.files.towers import text_rows
from reference_models.text.textfiles import read_json
from reference_models.vit_variants import VariantConfig

FILE = "open_clip_config.json"
PICTURES = {"vit": vit, "vit_variants": vit_variants, "swin": swin, "swinv2": swinv2}
TEXTS = {"bert": bert, "bert_variants": bert_variants}
SHAPED = {"act_kwargs", "norm_kwargs"}
TIMM = {f"timm_{name}" for name in ("model_name", "model_pretrained", "pool", "proj", "proj_bias", "drop", "drop_path")}
HF = {f"hf_{name}" for name in ("model_name", "model_pretrained", "proj_type", "pooler_type")}
KNOWN = {
    "vision_cfg": clip.KNOWN["vision_cfg"] | SHAPED | TIMM
    | {"ls_init_value", "no_ln_pre", "final_ln_after_pool", "pool_type", "pos_embed_type"},
    "text_cfg": clip.KNOWN["text_cfg"] | SHAPED | HF | {"proj_bias", "proj_type"},
    "model_cfg": clip.KNOWN["model_cfg"] | {"custom_text", "init_logit_bias"},
}  # fmt: skip
POOLERS = {"mean_pooler": "mean", "cls_pooler": "pooler", "cls_last_hidden_state_pooler": "cls"}


def read(data: dict) -> DualConfig:
    """The configuration of open_clip's model_cfg; ModelError naming what is not known."""
    vision, text = data.get("vision_cfg") or {}, data.get("text_cfg") or {}
    if data.get("multimodal_cfg") or text.get("embed_cls"):
        raise _refusal("CoCa", "multimodal_cfg, text_cfg.embed_cls")
    if isinstance(vision.get("layers"), list):
        raise _refusal("ResNet", "vision_cfg.layers")
    timm, hf = vision.get("timm_model_name"), text.get("hf_model_name")
    # what another library makes is said first
    pictures, seen = _of_timm(vision) if timm else (None, "linear")
    texts, meant = _of_transformers(text) if hf else (None, "bias" if text.get("proj_bias") else "linear")
    if unknown := clip.unknown_keys(data, KNOWN):
        raise ModelError(f"{FILE}: {unknown[0]} makes another model than those that are known here")
    plain = clip.read_sizes(data)
    pictures = pictures or _pictures(plain, vision)
    if not hf:
        shape = {f"text_{key}": value for key, value in _shape(text, plain.text_act).items()}
        texts, meant = replace(plain, **shape, family="clip_text"), "none" if text.get("proj_type") == "none" else meant
    sizes = {"embed_dim": plain.embed_dim, "logit_bias": data.get("init_logit_bias"), "trunk": bool(timm)}
    pad = getattr(texts, "pad_id", 0) if hf else None
    return DualConfig(plain.name, pictures, texts, **sizes, vision_proj=seen, text_proj=meant, text_pad=pad)


def _refusal(kind: str, where: str) -> ModelError:
    return ModelError(f"{FILE}: {where}: {kind}: {instead(kind) or 'not one of the models that are known here'}")


def _of_timm(data: dict) -> tuple:
    """(configuration, projection) of a tower of timm, which by default is its own classifier."""
    name, pool, kind = data["timm_model_name"], data.get("timm_pool", "avg"), data.get("timm_proj", "linear")
    told = {"architecture": name, "global_pool": pool} if pool else {"architecture": name}
    read = (family.config_from_json(told) for family in PICTURES.values())
    config = next((config for config in read if config is not None), None)
    if config is None:
        raise _refusal(name, "vision_cfg.timm_model_name")
    kinds = {"none": "none", "linear": "bias" if data.get("timm_proj_bias") else "linear", None: "bias", "": "bias"}
    if kind not in kinds or (config.family.startswith("swin") and pool not in ("", "avg")):
        raise ModelError(f"{FILE}: vision_cfg.timm_proj {kind!r}, timm_pool {pool!r} are not known together")
    return config, kinds[kind]


def _pictures(plain: CLIPConfig, data: dict) -> VariantConfig:
    """open_clip's own ViT with its options."""
    pool = ["norm", {"tok": "token"}.get(kind := data.get("pool_type", "tok"), kind)]
    return replace(
        vit_variants.tower_of(plain),
        layer_scale=data.get("ls_init_value") or 0.0,
        pre_norm=not data.get("no_ln_pre", False),
        patch_bias=False,
        pool=" ".join(pool[::-1] if data.get("final_ln_after_pool") else pool),
        **_shape(data, plain.vision_act),
    )


def _shape(data: dict, act: str) -> dict:
    """The activation, and the norms' epsilon."""
    other, norm = data.get("act_kwargs") or {}, data.get("norm_kwargs") or {}
    if {*norm} - {"eps"} or (other and (act, other) != ("gelu", {"approximate": "tanh"})):
        raise ModelError(f"{FILE}: act_kwargs {other}, norm_kwargs {norm} are not known")
    return {"act": "gelu_tanh" if other else act, "eps": norm.get("eps", 1e-5)}


def _of_transformers(data: dict) -> tuple:
    """(configuration, projection) of a tower of transformers: a folder with its config.json, or a
    name of a size that is known here."""
    name, pooler = data["hf_model_name"], data.get("hf_pooler_type", "mean_pooler")
    folder = Path(name)
    if (folder / "config.json").is_file():
        settings = read_json(folder / "config.json")
        read = (family.config_from_json(settings) for family in (bert, bert_variants))
    else:
        settings, plain = {"model_type": name}, folder.name.removesuffix("-uncased")
        read = (family.config_for(plain) for family in (bert, bert_variants))
    config = next((config for config in read if config is not None), None)
    if config is None:
        raise _refusal(str(settings.get("model_type")), "text_cfg.hf_model_name")
    proj = data.get("hf_proj_type", "mlp")
    if pooler not in POOLERS or proj not in ("linear", "mlp", None):
        raise ModelError(f"{FILE}: text_cfg.hf_pooler_type {pooler!r}, hf_proj_type {proj!r} are not known together")
    return replace(config, pooling=POOLERS[pooler]), proj or "none"


def key_table(config: DualConfig) -> list[Entry]:
    """Our names beside open_clip's; with custom_text its text tower has "text." before them."""
    table = [rename(name, name) for name in ("logit_scale", "logit_bias")]
    family, proj = config.vision.family, "visual_projection"
    if config.trunk:
        table += under("vision.", "visual.trunk.", PICTURES[family].key_table(config.vision, "timm"))
        table += [*linear(proj, "visual.trunk.head"), *linear(proj, "visual.head.proj")]
    elif family == "vit_variants":
        table += under("vision.", "", vit_variants.key_table(config.vision, "open_clip"))
        table.append(rename(f"{proj}.weight", "visual.proj", "transpose"))
    if (family := config.text.family) != "clip_text":
        table += under("text.", "transformer.", TEXTS[family].key_table(config.text, "transformers4"))
        return table + [
            rename(f"text_projection{part}", f"proj{part}") for part in (".weight", ".0.weight", ".2.weight")
        ]
    table += under("text.", "", text_rows(config.text.text_depth, "", "open_clip"))
    plain = [rename("text_projection.weight", "text_projection", "transpose")]
    return table + (linear("text_projection", "text_projection") if config.text_proj == "bias" else plain)
