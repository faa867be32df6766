"""The files of CLIP's text tower alone, as transformers writes it. See load.py for the protocol."""

from dataclasses import replace

from reference_models.clip import CLIPConfig, TextTower
from reference_models.files import clip
from reference_models.files.names import Entry
from reference_models.files.towers import text_rows

build = TextTower
layouts = {"transformers4": ("text_model.",), "transformers5": ("", "text_model.")}
adapter_layouts = ("transformers5", "transformers4")
ignored = r"position_ids$|^text_projection\."  # the projection stands behind what a tower returns
preprocess: dict = {}


def names() -> list[str]:
    return ["clip-text-nano"]


def config_for(name: str) -> CLIPConfig | None:
    """clip-text-nano; the other sizes come with the whole CLIP or as a folder."""
    return replace(clip.config_for("clip-nano"), name=name, family="clip_text") if name in names() else None


def key_table(config: CLIPConfig, layout: str) -> list[Entry]:
    """Our names beside open_clip's, or transformers', whose version 5 has no level above it."""
    kind = "open_clip" if layout == "open_clip" else "clip"
    return text_rows(config.text_depth, "text_model." if layout == "transformers4" else "", kind)


def config_from_json(data: dict) -> CLIPConfig | None:
    """Read the config.json of transformers' CLIPTextModel; None where it is of another family."""
    if data.get("model_type") != "clip_text_model":
        return None
    config = clip.config_from_json({"model_type": "clip", "text_config": data})
    return replace(config, name=f"clip-text-{config.text_dim}", family="clip_text")


def config_to_json(config: CLIPConfig, layout: str) -> dict:
    """config.json as transformers reads it."""
    return {"architectures": ["CLIPTextModel"], **clip.config_to_json(config, layout)["text_config"]}
