"""The files of CLIP's text tower alone, as transformers writes it. See load.py for the protocol."""

from dataclasses import replace

from reference_models.clip import CLIPConfig, TextTower
from reference_models.files import clip
from reference_models.files.names import Entry
from reference_models.files.towers import text_rows

build = TextTower
layouts = {"transformers4": ("text_model.",), "transformers5": ("", "text_model.")}
ignored = r"position_ids$|^text_projection\."  # the projection stands behind what a tower returns
# the other sizes come with the whole CLIP or as a folder
MODELS = {"clip-text-nano": replace(clip.config_for("clip-nano"), name="clip-text-nano", family="clip_text")}
names, config_for = list(MODELS), MODELS.get


def key_table(config: CLIPConfig, layout: str) -> list[Entry]:
    """Our names beside transformers', whose version 5 has no level above them."""
    return text_rows(config.text_depth, "text_model." if layout == "transformers4" else "", "clip")


def config_from_json(data: dict) -> CLIPConfig | None:
    if data.get("model_type") != "clip_text_model":
        return None
    config = clip.config_from_json({"model_type": "clip", "text_config": data})
    return replace(config, name=f"clip-text-{config.text_dim}", family="clip_text")


def config_to_json(config: CLIPConfig, layout: str) -> dict:
    return {"architectures": ["CLIPTextModel"], **clip.config_to_json(config, layout)["text_config"]}
