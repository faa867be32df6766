"""Rename an adapter between the module names of transformers 4 and 5, which
PEFT itself refuses to load.

    python -m minilora.commands.rename_adapter SRC DST --layout transformers5

SRC and DST are directories with adapter_config.json and adapter_model.safetensors. Only names
change: the tensors keep their bits. The names come from the families' key tables; which family an
adapter belongs to is read from its tensors' names, and from the class of its model where PEFT notes
it: CLIPVisionModel and CLIPTextModel by themselves, which in transformers 5 begin at their blocks.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from reference_models.errors import ModelError
from reference_models.files import beit, bert, clip, swin, swinv2, vit, vit_variants
from reference_models.files.names import Entry, under
from reference_models.files.safetensors import read_safetensors, write_safetensors
from reference_models.files.towers import text_rows, vision_rows
from reference_models.text.textfiles import read_json, write_atomic

LAYOUTS = ("transformers4", "transformers5")
PREFIX = "base_model.model."
# what an adapter adds to a module's name: lora_A.weight, lora_magnitude_vector, the bias of the
# adapted layer where that is trained
ADDED = re.compile(r"^(?P<module>.*?)(?P<added>\.(?:lora_|base_layer\.).*)$")


def _model(module, prefix: str, name: str | None = None) -> tuple[Callable, str]:
    return functools.partial(module.key_table, module.config_for(name or module.names()[0])), prefix


def _tower(rows: Callable, level: str, kind: str) -> tuple[Callable, None]:
    return lambda layout: rows(1, level if layout == "transformers4" else "", kind), None


def _siglip(layout: str) -> list[Entry]:
    text = under("text.", "", text_rows(1, "text_model.", "clip"))
    return text + under("vision.", "", vision_rows(1, "vision_model.", "siglip"))


# (layout -> rows of the key table, the prefix that names may lack or have another one in place of;
# None where the names begin at once)
FAMILIES: dict[str, tuple[Callable[[str], list[Entry]], str | None]] = {
    "vit": _model(vit, "vit."),
    "beit": _model(beit, "beit."),
    "swin": _model(swin, "swin."),
    "swinv2": _model(swinv2, "swinv2."),
    "dinov2": _model(vit_variants, "dinov2.", "dinov2-small"),
    "dinov2_with_registers": _model(vit_variants, "dinov2_with_registers.", "dinov2-registers-small"),
    "bert": _model(bert, ""),
    "clip": _model(clip, ""),
    "siglip": (_siglip, ""),
    "clip_vision": _tower(vision_rows, "vision_model.", "siglip"),  # CLIP's names and a head more
    "clip_text": _tower(text_rows, "text_model.", "clip"),
}
ALONE = {"CLIPVisionModel": "clip_vision", "SiglipVisionModel": "clip_vision", "CLIPTextModel": "clip_text"}


class Rule(NamedTuple):
    """Names that match `source` become `target`, its "{}" filled with the
    layers' numbers in order."""

    source: re.Pattern
    target: str


@functools.cache
def rules_for(family: str, source: str, target: str) -> list[Rule]:
    """One rule for every module and parameter of a family, for any number of layers, without the
    family's prefix."""
    rows, prefix = FAMILIES[family]
    new = {entry.ours: entry.theirs for entry in rows(target)}
    pairs = {}
    for entry in rows(source):
        if entry.ours in new:
            names = [name.removeprefix(prefix or "") for name in (entry.theirs, new[entry.ours])]
            pairs[tuple(_folded(name) for name in names)] = None
            owners = [name.rpartition(".")[0] for name in names]
            pairs[tuple(_folded(name) for name in owners)] = None
    rules = []
    for old, fresh in pairs:
        if old and fresh:
            core = re.escape(old).replace("<>", r"(\d+)")
            lead = "" if prefix is None else r"(?:.*\.)?"
            rules.append(Rule(re.compile(rf"(?P<lead>{lead}){core}"), fresh.replace("<>", "{}")))
    return rules


def _folded(name: str) -> str:
    return ".".join("<>" if part.isdigit() else part for part in name.split("."))


def renamer(family: str, source: str, target: str) -> Callable[[str], str | None]:
    """A function from a module's or tensor's name to its new name, or None where the
    family has no such name."""
    rules = rules_for(family, source, target)

    def rename(name: str) -> str | None:
        split = ADDED.match(name)
        module, added = (split["module"], split["added"]) if split else (name, "")
        found = [(rule, match) for rule in rules if (match := rule.source.fullmatch(module))]
        if not found:
            return None
        rule, match = min(found, key=lambda pair: len(pair[1]["lead"]))  # the most of the name
        return match["lead"] + rule.target.format(*match.groups()[1:]) + added

    return rename


def find_names(tensors: list[str], config: dict, layout: str, family: str | None = None) -> dict[str, str]:
    """{old name: new name} for the tensors of an adapter. ModelError where no family
    fits, or several differ."""
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    kind = (config.get("auto_mapping") or {}).get("base_model_class") or ""
    hint, family = kind.lower(), family or ALONE.get(kind)
    found, named = {}, {}
    for candidate in [family] if family else FAMILIES:
        for source in (other, layout):  # an adapter that already has the names keeps them
            rename = renamer(candidate, source, layout)
            names = {name: rename(name) for name in tensors}
            if all(names.values()):
                found.setdefault(candidate, names)
                if hint.startswith(candidate) or any(f"{candidate}." in name for name in tensors):
                    named.setdefault(candidate, names)
    answers = list((named or found).values())
    if not answers:
        raise ModelError(
            f"{tensors[0]}: no {family or 'model'} of transformers has such names; the families are "
            f"{', '.join(FAMILIES)}"
        )
    if any(answer != answers[0] for answer in answers):
        raise ModelError(f"the names fit {' and '.join(named or found)}; say which with --family")
    return answers[0]


def convert(source: str | Path, target: str | Path, layout: str, family: str | None = None) -> int:
    """Write the adapter of `source` under the names of `layout` to `target`; how
    many tensors were renamed.

    layout: "transformers4" or "transformers5". Raises ModelError for other layouts, unreadable
    files and names that belong to no family.
    """
    if layout not in LAYOUTS:
        raise ModelError(
            f"layout {layout!r}: names are converted between {' and '.join(LAYOUTS)}; for others load the adapter "
            "into its model and use evaluate.py --export-adapter"
        )
    source, target = Path(source), Path(target)
    config = read_json(source / "adapter_config.json")
    tensors = read_safetensors(source / "adapter_model.safetensors")
    if strange := [name for name in tensors if not name.startswith(PREFIX)] or not tensors:
        what = strange[0] if tensors else "no tensors"
        raise ModelError(f"{source / 'adapter_model.safetensors'}: {what}: not an adapter in PEFT's layout")
    names = find_names([name.removeprefix(PREFIX) for name in tensors], config, layout, family)
    renamed = {PREFIX + names[name.removeprefix(PREFIX)]: tensor for name, tensor in tensors.items()}
    text = json.dumps(_renamed_config(config, names), indent=2, sort_keys=True) + "\n"
    target.mkdir(parents=True, exist_ok=True)
    write_safetensors(target / "adapter_model.safetensors", renamed)
    write_atomic(target / "adapter_config.json", text.encode())
    return sum(old != new for old, new in names.items())


def _renamed_config(config: dict, names: dict[str, str]) -> dict:
    """adapter_config.json for the new names. Layers are named in full, which every
    rule of PEFT understands."""
    modules = {}  # adapted layers, old name: new name
    for old, new in names.items():
        if ".lora_" in old:
            modules[ADDED.match(old)["module"]] = ADDED.match(new)["module"]
    if all(old == new for old, new in names.items()):
        return config
    result = {**config, "target_modules": list(modules.values())}
    result |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    for key in ("rank_pattern", "alpha_pattern"):
        result[key] = {
            re.escape(new): value
            for pattern, value in (config.get(key) or {}).items()
            for old, new in modules.items()
            if re.fullmatch(rf"(.*\.)?({pattern})", old)
        }
    result["modules_to_save"] = _saved_modules(config.get("modules_to_save"), names)
    return result


def _saved_modules(saved: list[str] | None, names: dict[str, str]) -> list[str] | None:
    """modules_to_save, where a name changed as the full new names of the modules that it meant."""
    result = []
    for name in saved or []:
        owners = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in names.items()}
        meant = {old: new for old, new in owners.items() if old == name or old.endswith(f".{name}")}
        same = all(new == name or new.endswith(f".{name}") for new in meant.values())
        result += [name] if same else sorted(meant.values())
    return result or saved
