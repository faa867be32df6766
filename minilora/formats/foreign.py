"""Adapters under the names of other libraries: transformers 4 and 5, timm, and whatever else a
model's key table knows.

The model says how its names correspond: `model.key_table(layout)` is a list of entries with `ours`
(parameter names), `theirs` (one name) and `form`: "same", "cat" where they store several of our
layers as one, such as timm's qkv, "kernel" where they have a convolution over patches.

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

import torch
from torch import Tensor, nn

from minilora.atomic import write_json, write_safetensors
from minilora.dora import DoRALinear
from minilora.errors import UserError
from minilora.formats.peft import PREFIX, adapter_config
from minilora.inject import lora_layers, lora_state_dict
from minilora.lora import LoRALinear
from minilora.lora_config import LoRAConfig


def linear_layers(table) -> list:
    """The rows of a key table that are layers, without ".weight"; no adapter is transposed."""
    rows = [row for row in table if row.theirs.endswith(".weight") and row.form in ("same", "cat", "kernel")]
    end = -len(".weight")
    return [row._replace(theirs=row.theirs[:end], ours=tuple(name[:end] for name in row.ours)) for row in rows]


# ---- ours -> theirs


def export_adapter(model: nn.Module, directory: Path, layout: str) -> Path:
    """Write the adapter of `model` for `PeftModel.from_pretrained(their_model, directory)`. Raises
    UserError where model.key_table has no such layout, or the layout cannot hold the adapter."""
    table = layout_table(model, layout)
    layers = {name: layer for layer in linear_layers(table) for name in layer.ours}
    adapted = dict(lora_layers(model))
    if outside := [name for name in adapted if name not in layers]:
        raise UserError(
            f"export_adapter: {layout} has no layer of its own for {outside[0]}; target others, as in attn.q_proj"
        )
    chosen = list(dict.fromkeys(layers[name] for name in adapted))
    config = adapter_config(model)
    config["use_rslora"] = config["use_rslora"] and all(len(layer.ours) == 1 for layer in chosen)
    tensors, ranks, alphas = {}, {}, {}
    for layer in chosen:
        parts = [model.get_submodule(name) for name in layer.ours]
        values, rank, scaling = _joined(parts)
        if layer.form == "kernel":
            values = {key: _as_kernel(key, value) for key, value in values.items()}
        tensors |= {f"{layer.theirs}.{key}": value for key, value in values.items()}
        ranks[layer.theirs] = rank
        alphas[layer.theirs] = scaling * (math.sqrt(rank) if config["use_rslora"] else rank)
    others = _other_tensors(model, table, set(ranks))
    saved = [name.removesuffix(".weight") for name in others if name.endswith(".weight")]
    config |= {"target_modules": [*ranks], "modules_to_save": saved or None, **_with_patterns(ranks, alphas)}
    directory.mkdir(parents=True, exist_ok=True)
    named = {PREFIX + name: tensor for name, tensor in (tensors | others).items()}
    write_safetensors(directory / "adapter_model.safetensors", named)
    write_json(directory / "adapter_config.json", config)
    return directory


def layout_table(model: nn.Module, layout: str):
    """The key table of a layout, or a UserError; "transformers" is the newest of that library's."""
    layouts = list(getattr(model, "layouts", ()))
    found = {"transformers": "transformers5"}.get(layout, layout)
    if found not in layouts:
        names = layouts + ["transformers"] * ("transformers5" in layouts)
        known = ", ".join(names) or "only its own, which save_adapter writes"
        raise UserError(f"export_adapter: layout {layout!r} is not known to this model; it has {known}")
    return model.key_table(found)


def _joined(parts: list[nn.Module]) -> tuple[dict[str, Tensor], int, float]:
    """One adapter for several layers stacked on each other: ({name: tensor}, rank, scaling)."""
    adapted = [part for part in parts if isinstance(part, LoRALinear)]
    scaling = adapted[0].scaling
    # other scaling than the first part's goes into B; a part without adapter has rows, no columns
    blocks = [
        part.lora_B.weight.detach().cpu() * (part.scaling / scaling)
        if isinstance(part, LoRALinear)
        else torch.zeros(part.out_features, 0)
        for part in parts
    ]
    A = torch.cat([part.lora_A.weight.detach().cpu() for part in adapted])
    tensors = {"lora_A.weight": A, "lora_B.weight": torch.block_diag(*blocks)}
    if isinstance(adapted[0], DoRALinear):
        tensors["lora_magnitude_vector"] = torch.cat([_magnitude(part) for part in parts])
    if any(part.base_layer.bias is not None and part.base_layer.bias.requires_grad for part in adapted):
        biases = [getattr(part, "base_layer", part).bias for part in parts]
        tensors["base_layer.bias"] = torch.cat([bias.detach().cpu() for bias in biases])
    return tensors, len(A), scaling


def _as_kernel(key: str, value: Tensor) -> Tensor:
    """A (r, 3 p p) -> (r, 3, p, p), B (d, r) -> (d, r, 1, 1): PEFT's LoRA of a convolution."""
    if key == "lora_A.weight":
        side = math.isqrt(value.shape[1] // 3)
        return value.reshape(-1, 3, side, side)
    if key == "lora_magnitude_vector":
        return value.reshape(1, -1, 1, 1)
    return value[:, :, None, None] if key == "lora_B.weight" else value


def _magnitude(layer: nn.Module) -> Tensor:
    """DoRA's lengths; those of a part without adapter are the row norms of its W: no change."""
    if isinstance(layer, DoRALinear):
        return layer.lora_magnitude_vector.detach().cpu()
    return torch.linalg.vector_norm(layer.weight.detach().float(), dim=1).cpu()


def _other_tensors(model: nn.Module, table, adapted: set[str]) -> dict[str, Tensor]:
    """Trained tensors that are not adapters: head, norms, biases."""
    trained = {n: t for n, t in lora_state_dict(model).items() if ".lora_" not in n and ".base_layer." not in n}
    everything = {name.replace(".base_layer.", "."): p.detach() for name, p in model.named_parameters()}
    tensors, placed = {}, set()
    for entry in table:
        if entry.form == "ones" or not any(name in trained for name in entry.ours):
            continue
        placed.update(entry.ours)
        if entry.theirs.rpartition(".")[0] in adapted:  # its bias goes with the adapter
            continue
        if entry.form not in ("same", "cat"):
            raise UserError(
                f"export_adapter: {entry.ours[0]} was trained, but is stored in another form as {entry.theirs}"
            )
        parts = [everything[name].cpu() for name in entry.ours]
        tensors[entry.theirs] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if missed := [name for name in trained if name not in placed]:
        raise UserError(f"export_adapter: this layout has no name for {missed[0]}, which was trained")
    return tensors


def _with_patterns(ranks: dict[str, int], alphas: dict[str, float]) -> dict:
    """Fields that give each layer its rank and alpha: the commonest, patterns for the others."""
    alphas = {name: int(alpha) if float(alpha).is_integer() else alpha for name, alpha in alphas.items()}
    r, lora_alpha = (Counter(values.values() or [8]).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": {re.escape(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {re.escape(name): alpha for name, alpha in alphas.items() if alpha != lora_alpha},
    }


# ---- theirs -> ours


def adapter_to_ours(
    model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor], unknown: list[str], where: str, trained_on: str
):
    """Translate an adapter with another library's names: (LoRAConfig, tensors) with ours.

    Every layout of the model and every prefix that its names may lack or have in addition is
    tried; names and shapes must agree. UserError where none fits, naming the tensors that do not,
    and where two towers fit alike unless `trained_on`, the class that PEFT notes, names one.
    """
    own = {name.replace(".base_layer.", "."): tuple(p.shape) for name, p in model.named_parameters()}
    found, nearest = {}, dict.fromkeys(unknown, NO_PLACE)
    for layout in getattr(model, "layouts", ()):
        entries = {entry.theirs: entry for entry in model.key_table(layout)}
        layers = {layer.theirs: layer for layer in linear_layers(entries.values())}
        for prefix, names in _prefixed(tensors, entries):
            renamed = {names[name]: tensor for name, tensor in tensors.items()}
            misfits = _misfits(renamed, layers, entries, own)
            if len(misfits) < len(nearest):
                nearest = {name: misfits[theirs] for name, theirs in names.items() if theirs in misfits}
            if not misfits:
                translated = _translate(config, renamed, layers, entries)
                found.setdefault(frozenset(translated[1]), (prefix, translated))
    fitting = [(prefix, one) for prefix, one in found.values() if prefix.split("_")[0] in trained_on.lower()]
    fitting = fitting if len(found) > 1 and len(fitting) == 1 else list(found.values())
    if len(fitting) == 1:
        return fitting[0][1]
    if fitting:
        towers, first = " and ".join(f"{prefix}*" for prefix, _ in fitting), fitting[0][0] + next(iter(tensors))
        raise UserError(
            f"{where}: the adapter fits {towers} alike; write the one that is meant before the names of its tensors, "
            f'as in "{PREFIX}{first}"'
        )
    problem = "belongs to another model" if len(nearest) == len(tensors) else "does not fit this model"
    if {*nearest.values()} == {NO_PLACE}:
        listed = "have no place here, such as " + ", ".join([*nearest][:3])
    else:
        listed = "do not belong here: " + ", ".join(f"{name} ({why})" for name, why in [*nearest.items()][:5])
    raise UserError(f"{where}: the adapter {problem}: {len(nearest)} of its {len(tensors)} tensors {listed}")


NO_PLACE = "no place here"


def _module(name: str) -> str:
    return name.split(".lora_")[0].removesuffix(".base_layer.bias")


def _prefixed(tensors: dict[str, Tensor], known: dict):
    """(prefix, {name in the file: name to look for}) for every prefix with which a layer of the
    file is one of the table's, in the table's order: "vit." or none, added or taken away. Names
    that are the table's as they are stay, such as the head's."""
    layers = [f"{module}.weight" for module in dict.fromkeys(_module(name) for name in tensors if ".lora_" in name)]
    pairs = [(full.removesuffix(n), "") for full in known for n in layers if full == n or full.endswith(f".{n}")]
    pairs += [("", n.removesuffix(full)) for full in known for n in layers if n.endswith(f".{full}")]
    for added, taken in dict.fromkeys(pairs or [("", "")]):
        names = {}
        for name in tensors:
            plain = _module(name) + ".weight" if ".lora_" in name else name.replace(".base_layer.", ".")
            names[name] = name if plain in known else added + name.removeprefix(taken)
        yield added, names


def _misfits(tensors: dict, layers: dict, entries: dict, own: dict[str, tuple]) -> dict[str, str]:
    """{name: why} of the tensors that have no place in the model, or another shape than it."""
    wrong = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            layer = layers.get(_module(name))
            shapes = [own.get(f"{ours}.weight") for ours in layer.ours] if layer else [None]
        else:
            entry = entries.get(name.replace(".base_layer.", "."))
            known = entry is not None and entry.form in ("same", "cat", "kernel")
            shapes = [own.get(ours) for ours in entry.ours] if known else [None]
        if None in shapes:
            wrong[name] = NO_PLACE
            continue
        rows, rest = sum(shape[0] if shape else 1 for shape in shapes), shapes[0][1:]
        flat = tensor.flatten(1).shape if tensor.dim() > 1 else tensor.shape
        if ".lora_A" in name:
            fits = flat[1:] == rest
        elif ".lora_B" in name:
            fits = len(flat) == 2 and flat[0] == rows
        elif ".lora_" in name:
            fits = tensor.numel() == rows
        else:
            fits = (flat or (1,)) == (rows, *rest)
        if not fits:
            wrong[name] = f"{tuple(tensor.shape)}, here {rows} x {' x '.join(map(str, rest))}".removesuffix(" x ")
    return wrong


def _translate(config: LoRAConfig, tensors: dict[str, Tensor], layers: dict, entries: dict):
    result, ranks, alphas, power = {}, {}, {}, 0.5 if config.use_rslora else 1
    for theirs in dict.fromkeys(_module(name) for name in tensors if ".lora_" in name):
        options = config.layer_options(theirs)
        parts = _split(layers[theirs], tensors)
        if config.bias == "all" and f"{theirs}.base_layer.bias" in tensors:
            names = layers[theirs].ours
            biases = zip(names, tensors[f"{theirs}.base_layer.bias"].chunk(len(names)), strict=True)
            result |= {f"{name}.bias": bias for name, bias in biases if name not in parts}
        for ours, part in parts.items():
            result |= {f"{ours}.{key}": value for key, value in part.items()}
            ranks[ours] = len(part["lora_A.weight"])
            alphas[ours] = options["lora_alpha"] * (ranks[ours] / options["r"]) ** power
    saved = []
    for name, tensor in tensors.items():
        if ".lora_" in name or ".base_layer." in name:
            continue
        entry = entries[name]
        tensor = tensor.flatten(1) if entry.form == "kernel" else tensor
        result |= dict(zip(entry.ours, tensor.chunk(len(entry.ours)) if len(entry.ours) > 1 else [tensor], strict=True))
        if name.endswith(".weight"):
            saved += [ours.rpartition(".")[0] for ours in entry.ours]
    own = {"target_modules": tuple(ranks), "layers_to_transform": None, "modules_to_save": tuple(saved)}
    return replace(config, **own, **_with_patterns(ranks, alphas)), result


def _split(layer, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{our layer: its tensors}; of a fused layer the parts that B uses, with their columns."""
    keys = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "base_layer.bias")
    whole = {key: tensors[f"{layer.theirs}.{key}"] for key in keys if f"{layer.theirs}.{key}" in tensors}
    # of a convolution: its kernel has the rows of a matrix
    whole = {key: t.flatten(1 if ".weight" in key else 0) for key, t in whole.items()}
    if missing := [key for key in keys[:2] if key not in whole]:
        raise UserError(f"the adapter has no {layer.theirs}.{missing[0]}")
    count, A, B = len(layer.ours), whole["lora_A.weight"], whole["lora_B.weight"]
    if len(A) != B.shape[1]:
        raise UserError(f"the adapter is damaged: {layer.theirs}.lora_A has rank {len(A)}, its lora_B {B.shape[1]}")
    if count == 1:
        return {layer.ours[0]: whole}
    rest = {key: whole[key].chunk(count) for key in keys[2:] if key in whole}
    blank = not B.any()  # a fresh adapter: nothing says which parts are meant, so all are
    parts = {}
    for i, (ours, rows) in enumerate(zip(layer.ours, B.chunk(count), strict=True)):
        used = torch.ones(A.shape[0], dtype=torch.bool) if blank else rows.any(dim=0)
        if used.any():
            own = {"lora_A.weight": A[used].contiguous(), "lora_B.weight": rows[:, used].contiguous()}
            parts[ours] = own | {key: chunks[i].contiguous() for key, chunks in rest.items()}
    return parts
