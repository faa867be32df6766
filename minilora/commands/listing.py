"""--list-models, --list-recipes and --list-targets: print and exit."""

import argparse
import textwrap
from collections import Counter

import torch
from torch import nn

from minilora.report.tables import text_table
from minilora.settings.parse import recipes
from reference_models import list_models, load_pretrained
from reference_models.load import bundled_weights, config_for


def print_lists(args: argparse.Namespace) -> bool:
    """Prints the lists that were asked for; True if there was one."""
    if args.list_models:
        rows = [[name, use_of(name), "bundled" if bundled_weights(name) else ""] for name in list_models()]
        print(text_table(["model", "for", "weights"], rows))
        print("Weights that are not bundled: --weights with a safetensors file, a folder, or hf:org/name.")
    if args.list_recipes:
        for name, text in recipes().items():
            print(textwrap.fill(text, 96, initial_indent=f"{name:25}", subsequent_indent=" " * 25))
        print("Use: python train.py --recipe NAME --data-dir DIR; flags beside it win.")
    if args.list_targets:
        with torch.device("meta"):
            model = load_pretrained(args.list_targets, "none")
        print(text_table(["target", "layers", "in", "out"], target_rows(model)))
    return bool(args.list_models or args.list_recipes or args.list_targets)


def use_of(model: str) -> str:
    """The tasks, or the part of one, that a model is made for."""
    known = {"clip": "choice, zero-shot", "dual": "choice, zero-shot", "fusion": "vqa"}
    known |= dict.fromkeys(("bert", "bert_variants"), "vqa: text=") | {"student": "vqa: learns from --teacher"}
    return known.get(config_for(model).family, "classify; vqa: vision=")


def target_rows(model: nn.Module) -> list[list]:
    """(target, layers, in, out) of linear layers that LoRA can adapt, a row per shape; no heads."""
    counts = Counter()
    towers = [name for name in ("vision", "text") if hasattr(model, name)]
    heads = tuple(getattr(model, "head_modules", ()))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(heads):
            tower = next((f"{t}." for t in towers if name.startswith(t + ".")), "")
            counts[tower + name.rpartition(".")[2], module.in_features, module.out_features] += 1
    return [[target, count, n_in, n_out] for (target, n_in, n_out), count in counts.items()]
