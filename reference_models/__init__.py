"""Encoders written by hand, with separate q, k, v and out projections, loaded from people's files.

One file for each family holds the model and nothing else, a chapter to read; what they share is in
layers.py. Nothing here knows of LoRA: minilora adapts any of these models by its layers' names.

Why they are written anew: LoRA replaces a layer that is called. Libraries that keep q, k and v in
one matrix, or read the weights of a projection instead of calling it, leave it nothing to replace;
here every projection is an nn.Linear of its own.

Read in this order:
  layers, vit             attention, MLP, block; the model that the others vary
  processor               whether attention is faster fused by torch or written out
  beit, swin, swinv2      position bias, windows, cosine attention
  text_layers, bert, clip who sees whom in a text; text, and text beside pictures
  bert_variants, dual     RoBERTa and the like; SigLIP, and any two encoders
  fusion, student         two towers and a head
  mobilenet               convolutions, for comparison
  load                    the four functions below: a name or a checkpoint -> a model, and back
  files/                  what checkpoints look like: a key table instead of code for each family
                          (vit ... student), names; safetensors without pickle; preprocess and
                          config_check, which believe a checkpoint only where it makes sense; hub
                          and download for hf:org/name; rename_adapter
  text/                   text -> ids without another library: tokenizers, wordpiece, bpe, unigram
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


# looked up at first use: who wants ModelError alone waits for no torch
def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'reference_models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"reference_models.{_HOME[name]}"), name)
