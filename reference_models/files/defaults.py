"""What holds for a family whose module leaves it out. See load.py for the protocol."""

layouts = {}
adapter_layouts = ("transformers5", "transformers4")
ignored = r"^$"
optional = r"^$"
own_prefixes = ("",)
layout_settings = {}
preprocess = {}


def fit_config(config, shapes: dict[str, tuple]):
    return config


def adapt(state: dict, old, new) -> None:
    """Nothing depends on the picture size."""


def config_from_json(data: dict) -> None:
    """No other library writes such models."""


def lone_file(config, keys, file_name: str, layout: str) -> tuple[dict, list[str]]:
    return {}, []


def notes(config, layout: str) -> list[str]:
    return []
