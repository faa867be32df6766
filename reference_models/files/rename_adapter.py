"""Rename an adapter between the module names of transformers 4 and 5, which PEFT does not load.

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
from reference_models.files import beit, bert, clip, clip_text, dual, swin, swinv2, vit, vit_variants
from reference_models.files.safetensors import read_safetensors, write_safetensors
from reference_models.text.textfiles import read_json, write_atomic

LAYOUTS = ("transformers4", "transformers5")
PREFIX = "base_model.model."
# what an adapter adds to a module's name: lora_A.weight, lora_magnitude_vector, the bias of the
# adapted layer where that is trained
ADDED = re.compile(r"^(?P<module>.*?)(?P<added>\.(?:lora_|base_layer\.).*)$")

SIGLIP = dual.config_for("siglip-base-patch16-224")
REGISTERS = vit_variants.config_for("dinov2-registers-small")
# (its module, a configuration, the prefix that names may lack or have another one in place of; None
# where the names begin at once)
FAMILIES = {
    "vit": (vit, vit.config_for("vit-nano-patch8-48"), "vit."),
    "beit": (beit, beit.config_for("beit-nano-patch8-48"), "beit."),
    "swin": (swin, swin.config_for("swin-nano-patch4-window6-48"), "swin."),
    "swinv2": (swinv2, swinv2.config_for("swinv2-nano-patch4-window6-48"), "swinv2."),
    "dinov2": (vit_variants, vit_variants.config_for("dinov2-small"), "dinov2."),
    "dinov2_with_registers": (vit_variants, REGISTERS, "dinov2_with_registers."),
    "bert": (bert, bert.config_for("bert-nano"), ""),
    "clip": (clip, clip.config_for("clip-nano"), ""),
    "siglip": (dual, SIGLIP, ""),
    "clip_vision": (vit_variants, SIGLIP.vision, None),  # CLIP's names and a head more
    "clip_text": (clip_text, clip_text.config_for("clip-text-nano"), None),
}
ALONE = {"CLIPVisionModel": "clip_vision", "SiglipVisionModel": "clip_vision", "CLIPTextModel": "clip_text"}


class Rule(NamedTuple):
    """Names that match `source` become `target`, its "{}" the layers' numbers in order."""

    source: re.Pattern
    target: str


@functools.cache
def rules_for(family: str, source: str, target: str) -> list[Rule]:
    """A rule for every module and parameter of a family, without its prefix, for any depth."""
    module, config, prefix = FAMILIES[family]
    new = {entry.ours: entry.theirs for entry in module.key_table(config, target)}
    pairs = {}
    for entry in module.key_table(config, source):
        # a tower by itself has no classifier
        if entry.ours in new and not (prefix is None and entry.ours[0].startswith("head.")):
            names = [_folded(name.removeprefix(prefix or "")) for name in (entry.theirs, new[entry.ours])]
            owners = [name.rpartition(".")[0] for name in names]
            pairs |= dict.fromkeys((tuple(names), tuple(owners)))
    lead = "" if prefix is None else r"(?:.*\.)?"
    return [
        Rule(re.compile(f"(?P<lead>{lead})" + re.escape(old).replace("<>", r"(\d+)")), fresh.replace("<>", "{}"))
        for old, fresh in pairs
        if old and fresh
    ]


def _folded(name: str) -> str:
    return ".".join("<>" if part.isdigit() else part for part in name.split("."))


def renamer(family: str, source: str, target: str) -> Callable[[str], str | None]:
    """A function from a module's or tensor's name to its new one, None where there is none."""
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
    """{old name: new name} of an adapter; ModelError where no family fits, or several differ."""
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
    """Write the adapter of `source` under the names of `layout` ("transformers4" or
    "transformers5") to `target`; how many tensors were renamed. Raises ModelError for other
    layouts, unreadable files and names that belong to no family.
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
    """adapter_config.json for the new names, in full, which every rule of PEFT understands."""
    adapted = ((ADDED.match(old), ADDED.match(new)) for old, new in names.items() if ".lora_" in old)
    modules = {old["module"]: new["module"] for old, new in adapted}
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
