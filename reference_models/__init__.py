"""Encoders written out by hand, with separate q, k, v and out projections, loaded from the files people have.

layers.py holds what they share; one file for each family; names.py the key tables; load.py the four functions
below. Nothing here knows of LoRA: minilora adapts any of these models by the names of its layers.
"""

import importlib

_HOME = {
    "ModelError": "errors",
    "create_model": "load",
    "list_models": "load",
    "load_pretrained": "load",
    "save_pretrained": "load",
}
__all__ = list(_HOME)


def __getattr__(name: str):  # looked up at first use, so that `python -m reference_models.names` imports once
    if name not in _HOME:
        raise AttributeError(f"module 'reference_models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"reference_models.{_HOME[name]}"), name)
