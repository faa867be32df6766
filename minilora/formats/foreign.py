"""Adapters under the names of other libraries: transformers 4 and 5, timm, and whatever else a
model's key table knows.

The model says how its names correspond: `model.key_table(layout)` is a list of entries with `ours`
(parameter names), `theirs` (one name) and `form` ("same", or "cat" where they store several of our
layers as one, such as timm's qkv).

LoRA on some parts of a fused layer is again one plain LoRA. For q and v of a fused qkv, with zeros
in the rows of k:

    A = [A_q]  (2r, in)        B = [B_q   0 ]  (3d, 2r)
        [A_v]                      [ 0    0 ]
                                   [ 0   B_v]          s as before: alpha doubles with the rank

so an exported adapter computes exactly what ours does, and the parts are found again where B has
columns of zeros.
"""

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minilora.atomic import write_json, write_safetensors
from minilora.dora import DoRALinear
from minilora.errors import UserError
from minilora.formats.peft import PREFIX, adapter_config
from minilora.inject import lora_layers, lora_state_dict
from minilora.lora import LoRALinear
from minilora.lora_config import LoRAConfig


class Layer(NamedTuple):
    """One layer of theirs: its name and our layers in it, several where it is fused."""

    theirs: str
    ours: tuple[str, ...]


def linear_layers(table) -> list[Layer]:
    """The layers of a key table, from the entries of their weights; what is stored transposed has
    no adapter form."""
    weights = [entry for entry in table if entry.theirs.endswith(".weight") and entry.form in ("same", "cat")]
    strip = len(".weight")
    return [Layer(e.theirs[:-strip], tuple(name[:-strip] for name in e.ours)) for e in weights]


# ---- ours -> theirs


def export_adapter(model: nn.Module, directory: Path, layout: str) -> Path:
    """Write the adapter of `model` so that `PeftModel.from_pretrained(their_model,
    directory)` loads it.

    layout: a layout of model.key_table. Raises UserError where the layout does not exist or cannot
    hold the adapter.
    """
    table = layout_table(model, layout)
    layers = {name: layer for layer in linear_layers(table) for name in layer.ours}
    adapted = dict(lora_layers(model))
    if outside := [name for name in adapted if name not in layers]:
        raise UserError(f"export_adapter: {layout} has no layer of its own for {outside[0]}; target other modules")
    chosen = list(dict.fromkeys(layers[name] for name in adapted))
    fused = any(len(layer.ours) > 1 for layer in chosen)
    tensors, ranks, alphas = {}, {}, {}
    for layer in chosen:
        parts = [model.get_submodule(name) for name in layer.ours]
        values, ranks[layer.theirs], scaling = _joined(parts)
        tensors |= {f"{layer.theirs}.{key}": value for key, value in values.items()}
        rslora = _config(model).use_rslora and not fused
        alphas[layer.theirs] = scaling * (math.sqrt(ranks[layer.theirs]) if rslora else ranks[layer.theirs])
    others, saved = _other_tensors(model, table, {layer.theirs for layer in chosen})
    config = adapter_config(model)
    config |= {"r": _most_common(ranks), "lora_alpha": _plain_number(_most_common(alphas))}
    config["rank_pattern"] = {re.escape(n): r for n, r in ranks.items() if r != config["r"]}
    config["alpha_pattern"] = {re.escape(n): _plain_number(a) for n, a in alphas.items() if a != config["lora_alpha"]}
    config |= {"target_modules": [layer.theirs for layer in chosen], "modules_to_save": saved or None}
    config["use_rslora"] = config["use_rslora"] and not fused
    directory.mkdir(parents=True, exist_ok=True)
    named = {PREFIX + name: tensor for name, tensor in (tensors | others).items()}
    write_safetensors(directory / "adapter_model.safetensors", named)
    write_json(directory / "adapter_config.json", config)
    return directory


def layout_table(model: nn.Module, layout: str):
    """The key table of a layout; "transformers" is the newest of that library's. UserError for one
    that the model does not have."""
    layouts = list(getattr(model, "layouts", ()))
    found = {"transformers": "transformers5"}.get(layout, layout)
    if found not in layouts:
        names = layouts + ["transformers"] * ("transformers5" in layouts)
        known = ", ".join(names) or "only its own, which save_adapter writes"
        raise UserError(f"export_adapter: layout {layout!r} is not known to this model; it has {known}")
    return model.key_table(found)


def _config(model: nn.Module) -> LoRAConfig:
    return getattr(model, "lora_config", None) or LoRAConfig(target_modules=())


def _joined(parts: list[nn.Module]) -> tuple[dict[str, Tensor], int, float]:
    """One adapter for several layers stacked on each other: ({name: tensor}, rank, scaling)."""
    adapted = [part for part in parts if isinstance(part, LoRALinear)]
    scaling, rank = adapted[0].scaling, sum(part.r for part in adapted)
    B = torch.zeros(sum(part.out_features for part in parts), rank)
    row = column = 0
    for part in parts:
        if isinstance(part, LoRALinear):
            # other scaling than the first part's goes into B
            share = part.lora_B.weight.detach().cpu()
            share = share if part.scaling == scaling else share * (part.scaling / scaling)
            B[row : row + part.out_features, column : column + part.r] = share
            column += part.r
        row += part.out_features
    A = torch.cat([part.lora_A.weight.detach().cpu() for part in adapted])
    tensors = {"lora_A.weight": A, "lora_B.weight": B}
    if isinstance(adapted[0], DoRALinear):
        tensors["lora_magnitude_vector"] = torch.cat([_magnitude(part) for part in parts])
    if any(part.base_layer.bias is not None and part.base_layer.bias.requires_grad for part in adapted):
        tensors["base_layer.bias"] = torch.cat([_inner(part).bias.detach().cpu() for part in parts])
    return tensors, rank, scaling


def _inner(layer: nn.Module) -> nn.Linear:
    return layer.base_layer if isinstance(layer, LoRALinear) else layer


def _magnitude(layer: nn.Module) -> Tensor:
    """DoRA's lengths; those of a part without adapter are the row norms of its W: no change."""
    if isinstance(layer, DoRALinear):
        return layer.lora_magnitude_vector.detach().cpu()
    norms = dict(layer.named_parameters())["weight"].detach().float()
    return torch.linalg.vector_norm(norms, dim=1).cpu()


def _other_tensors(model: nn.Module, table, adapted: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Trained tensors that are not adapters: head, norms, biases. Returns them and the
    modules to save."""
    trained = {n: t for n, t in lora_state_dict(model).items() if ".lora_" not in n and ".base_layer." not in n}
    everything = {name.replace(".base_layer.", "."): p.detach() for name, p in model.named_parameters()}
    tensors, modules, placed = {}, [], set()
    for entry in table:
        if not any(name in trained for name in entry.ours):
            continue
        placed.update(entry.ours)
        module = entry.theirs.rpartition(".")[0]
        if module in adapted:  # the bias of an adapted layer is written with its adapter
            continue
        if entry.form not in ("same", "cat"):
            raise UserError(
                f"export_adapter: {entry.ours[0]} was trained, but is stored in another form as {entry.theirs}"
            )
        tensors[entry.theirs] = torch.cat([everything[name].cpu() for name in entry.ours])
        if entry.theirs.endswith(".weight"):
            modules.append(module)
    if missed := [name for name in trained if name not in placed]:
        raise UserError(f"export_adapter: this layout has no name for {missed[0]}, which was trained")
    return tensors, modules


def _most_common(values: dict):
    return Counter(values.values()).most_common(1)[0][0] if values else 8


def _plain_number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


# ---- theirs -> ours


def adapter_to_ours(model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor], unknown: list[str], where: str):
    """Translate an adapter with another library's names: (LoRAConfig, tensors) with ours. UserError
    where none fits."""
    for layout in getattr(model, "layouts", ()):
        table = model.key_table(layout)
        layers = {layer.theirs: layer for layer in linear_layers(table)}
        renamed = _with_prefix(tensors, {entry.theirs for entry in table})
        if all(_module(name) in layers for name in renamed if ".lora_" in name) and _known(renamed, layers, table):
            return _translate(config, renamed, layers, table)
    raise UserError(
        f"{where}: the adapter belongs to another model: {len(unknown)} of its {len(tensors)} tensors have no place "
        f"here, such as {', '.join(unknown[:3])}"
    )


def _module(name: str) -> str:
    return name.split(".lora_")[0].removesuffix(".base_layer.bias")


def _known(tensors: dict, layers: dict, table) -> bool:
    names = {entry.theirs for entry in table}
    rest = [name for name in tensors if ".lora_" not in name]
    return all(name.replace(".base_layer.", ".") in names for name in rest)


def _with_prefix(tensors: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """The tensors with the prefix that the table's names have ("vit."), also where the
    file leaves it out."""
    plain = {name: _module(name) + ".weight" for name in tensors if name.endswith(".lora_A.weight")}
    for name in list(plain.values())[:1]:
        for full in names:
            if full.endswith("." + name):
                prefix = full.removesuffix(name)
                return {n if n in names or n.startswith(prefix) else prefix + n: t for n, t in tensors.items()}
    return tensors


def _translate(config: LoRAConfig, tensors: dict[str, Tensor], layers: dict[str, Layer], table):
    result, ranks, scalings = {}, {}, {}
    for theirs in dict.fromkeys(_module(name) for name in tensors if ".lora_" in name):
        options = config.layer_options(theirs)
        root = math.sqrt(options["r"]) if config.use_rslora else options["r"]
        parts = _split(layers[theirs], theirs, tensors)
        if config.bias == "all" and f"{theirs}.base_layer.bias" in tensors:
            names = layers[theirs].ours
            biases = zip(names, tensors[f"{theirs}.base_layer.bias"].chunk(len(names)), strict=True)
            result |= {f"{name}.bias": bias for name, bias in biases if name not in parts}
        for ours, part in parts.items():
            result |= {f"{ours}.{key}": value for key, value in part.items()}
            ranks[ours], scalings[ours] = part["lora_A.weight"].shape[0], options["lora_alpha"] / root
    entries = {entry.theirs: entry for entry in table}
    saved = []
    for name, tensor in tensors.items():
        if ".lora_" in name or ".base_layer." in name:
            continue
        entry = entries[name]
        result |= dict(zip(entry.ours, tensor.chunk(len(entry.ours)), strict=True))
        if name.endswith(".weight"):
            saved += [ours.rpartition(".")[0] for ours in entry.ours]
    power = 0.5 if config.use_rslora else 1.0
    alphas = {name: scaling * ranks[name] ** power for name, scaling in scalings.items()}
    r, alpha = _most_common(ranks), _most_common(alphas)
    return replace(
        config,
        r=r,
        lora_alpha=_plain_number(alpha),
        target_modules=tuple(ranks),
        layers_to_transform=None,
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={re.escape(name): _plain_number(a) for name, a in alphas.items() if a != alpha},
        modules_to_save=tuple(saved),
    ), result


def _split(layer: Layer, theirs: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{our layer: its tensors}. Of a fused layer each part keeps the columns of B that it uses;
    unused parts are left."""
    keys = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "base_layer.bias")
    whole = {key: tensors[f"{theirs}.{key}"] for key in keys if f"{theirs}.{key}" in tensors}
    if missing := [key for key in keys[:2] if key not in whole]:
        raise UserError(f"the adapter has no {theirs}.{missing[0]}")
    count = len(layer.ours)
    if count == 1:
        return {layer.ours[0]: whole}
    A, B = whole["lora_A.weight"], whole["lora_B.weight"]
    rest = {key: whole[key].chunk(count) for key in keys[2:] if key in whole}
    blank = not B.any()  # a fresh adapter: nothing says which parts are meant, so all are
    parts = {}
    for i, (ours, rows) in enumerate(zip(layer.ours, B.chunk(count), strict=True)):
        used = torch.ones(A.shape[0], dtype=torch.bool) if blank else rows.any(dim=0)
        if used.any():
            own = {"lora_A.weight": A[used].contiguous(), "lora_B.weight": rows[:, used].contiguous()}
            parts[ours] = own | {key: chunks[i].contiguous() for key, chunks in rest.items()}
    return parts
