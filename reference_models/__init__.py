"""Encoders written out by hand, with separate q, k, v and out projections, loaded from the files people have.

layers.py holds what they share; one file for each family; names.py the key tables; load.py the four functions
below. Nothing here knows of LoRA: minilora adapts any of these models by the names of its layers.
"""

from reference_models.errors import ModelError
from reference_models.load import create_model, list_models, load_pretrained, save_pretrained

__all__ = ["ModelError", "create_model", "list_models", "load_pretrained", "save_pretrained"]
