"""The files of dual encoders: transformers' VisionTextDualEncoderModel, whose towers are a ViT and
a BERT. See load.py for the protocol.

That model takes from each tower what its library calls pooler_output: of BertModel and ViTModel
tanh(W x + b), of Dinov2Model the class token after the last norm. So a ViT without pooler is
written as a Dinov2Model whose layer scales are 1, which computes the same.
"""

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from reference_models.dual import DualConfig, DualEncoder
from reference_models.errors import ModelError
from reference_models.files import bert, vit
from reference_models.files.names import Entry, linear, rename, under
from reference_models.vit import ViTConfig

layouts = {"transformers4": ("",), "transformers5": ("",)}
adapter_layouts = ("transformers5", "transformers4")
ignored = r"position_ids$|\.mask_token$|^vision_model\.classifier\."
optional = r"^$"
layout_settings = {}

SAME = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
DINO = {  # the projections of Dinov2Model's attention
    "transformers4": ("attention.query", "attention.key", "attention.value", "output.dense"),
    "transformers5": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


def build(config: DualConfig, vision: nn.Module, text: nn.Module) -> DualEncoder:
    """The towers, of CLIP the one that is meant, and what joins them."""
    return DualEncoder(config, getattr(vision, "vision", vision), getattr(text, "text", text))


def join(vision: nn.Module, text: nn.Module, embed_dim: int = DualConfig.embed_dim) -> DualEncoder:
    """A dual encoder of two loaded models with new projections; the first one's preprocessing."""
    model = build(DualConfig("dual", vision.config, text.config, embed_dim), vision, text)
    model.layouts, model.key_table = adapter_layouts, partial(key_table, model.config)
    model.preprocess, model.labels, model.notes = model.vision.preprocess, None, []
    return model


def names() -> list[str]:
    return ["dual-nano"]


def config_for(name: str) -> DualConfig | None:
    if name != "dual-nano":
        return None
    return DualConfig(name, replace(vit.config_for("vit-nano-patch8-48"), num_classes=0), bert.config_for("bert-nano"))


def key_table(config: DualConfig, layout: str) -> list[Entry]:
    """Our names beside VisionTextDualEncoderModel's; no row for a tower that has no
    counterpart there."""
    table = [rename(name, name) for name in ("visual_projection.weight", "text_projection.weight", "logit_scale")]
    if config.vision.family == "vit":
        own = vit.key_table(config.vision, layout) if config.vision.pooler else dino_table(config.vision, layout)
        table += under("vision.", "vision_model.", own, "vit.")
    if config.text.family == "bert":
        table += under("text.", "text_model.", bert.key_table(config.text, layout))
    return table


def dino_table(config: ViTConfig, layout: str) -> list[Entry]:
    """Our ViT beside Dinov2Model."""
    patch = "embeddings.patch_embeddings.projection"
    table = [
        rename("patch_embed.proj.weight", f"{patch}.weight", "kernel"),
        rename("patch_embed.proj.bias", f"{patch}.bias"),
        rename("cls_token", "embeddings.cls_token"),
        rename("pos_embed", "embeddings.position_embeddings"),
        *linear("norm", "layernorm"),
    ]
    for i in range(config.depth):
        for k in (1, 2):
            table.append(rename(f"blocks.{i}.norm{k}.weight", f"encoder.layer.{i}.layer_scale{k}.lambda1", "ones"))
        for name in SAME:
            table += linear(f"blocks.{i}.{name}", f"encoder.layer.{i}.{name}")
        for ours, theirs in zip(("q_proj", "k_proj", "v_proj", "out_proj"), DINO[layout], strict=True):
            table += linear(f"blocks.{i}.attn.{ours}", f"encoder.layer.{i}.attention.{theirs}")
    return table


def fit_config(config: DualConfig, shapes: dict[str, tuple]) -> DualConfig:
    """Whether the towers have poolers."""
    has = {tower: f"{tower}.pooler.dense.weight" in shapes for tower in ("vision", "text")}
    towers = {t: getattr(config, t) for t in has if hasattr(getattr(config, t), "pooler")}
    return replace(config, **{tower: replace(one, pooler=has[tower]) for tower, one in towers.items()})


def adapt(state: dict[str, Tensor], old: DualConfig, new: DualConfig) -> None:
    """Towers are fitted to their picture size before they are joined."""


def config_from_json(data: dict) -> DualConfig | None:
    """Read transformers' config.json; None where it is of another family."""
    if data.get("model_type") != "vision-text-dual-encoder":
        return None
    vision, text = data.get("vision_config") or {}, data.get("text_config") or {}
    kind = vision.get("model_type")
    if kind == "dinov2" and vision.get("layerscale_value", 1.0) == 1.0:
        vision = vision | {"model_type": "vit"} | {"intermediate_size": vision["hidden_size"] * vision["mlp_ratio"]}
    towers = vit.config_from_json(vision), bert.config_from_json(text)
    for tower, config in zip(("vision", "text"), towers, strict=True):
        if config is None:
            kind = (data.get(f"{tower}_config") or {}).get("model_type")
            raise ModelError(f"config.json: a dual encoder with a {tower} tower {kind!r} is not supported: vit, bert")
    vision = replace(towers[0], num_classes=0, pooler=kind != "dinov2")
    sizes = data.get("projection_dim", 512), data.get("logit_scale_init_value", 2.6592)
    return DualConfig("dual", vision, towers[1], *sizes)


def config_to_json(config: DualConfig, layout: str) -> dict:
    """config.json as transformers reads it; ModelError for towers that it does not know so."""
    text, pooling = config.text, getattr(config.text, "pooling", "pooler")
    if config.vision.family != "vit" or config.vision.distilled or text.family != "bert":
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
        vision |= {"mlp_ratio": config.vision.hidden / config.vision.dim, "use_mask_token": False}
        if config.vision.hidden % config.vision.dim == 0:
            vision["mlp_ratio"] = config.vision.hidden // config.vision.dim
    return {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": "vision-text-dual-encoder",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.logit_scale,
        "vision_config": vision,
        "text_config": bert.config_to_json(text, layout),
    }
