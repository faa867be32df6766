"""Encoders written out by hand, with separate q, k, v and out projections, loaded from the
files people have.

layers.py holds what they share; one file for each family; names.py the key tables; load.py
the four functions
below. Nothing here knows of LoRA: minilora adapts any of these models by the names of its layers.

Why they are written anew: LoRA replaces a layer that is called. Libraries that keep q, k and v in
one matrix, or read the weights of a projection instead of calling it, leave it nothing to replace;
here every projection is an nn.Linear of its own.

Read in this order:
layers, vit                  attention, MLP, block; the model that the others vary
beit, swin, swinv2           position bias, windows, cosine attention          mobilenet  convolutions, for comparison
bert, clip                   text, and text beside pictures                    fusion, student  two towers and a head
load, names                  files -> model: key tables instead of code        *_files    the tables of each family
tokenizers, wordpiece, bpe   text -> ids, without another library
files, hub, download         safetensors without pickle, hf:org/name, resumed and checked downloads
preprocess, config_check     what a checkpoint says of its pictures and sizes, believed only where it makes sense
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


# looked up at first use, so that `python -m reference_models.files.names` imports once
def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'reference_models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"reference_models.{_HOME[name]}"), name)
