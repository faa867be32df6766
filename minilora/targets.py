"""Choose layers by name: which ones a LoRAConfig means, and what to say when it means none.

The rules are PEFT's: a name is a full dotted name or its end after a dot; one string is a regular
expression for the whole name.
"""

from collections import Counter

from torch import nn

from minilora.errors import UserError
from minilora.lora_config import LoRAConfig
from minilora.patterns import fullmatch

HEADS = ("head", "heads", "classifier", "score", "fc")  # of timm, torchvision and transformers


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Dotted names of the layers that `config` adapts, in the model's order; UserError where a
    target finds none."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name}
    targets, spared = config.target_modules, saved_modules(model, config)
    if targets == "all-linear":
        heads = spared + list(getattr(model, "head_modules", HEADS))
        found = [n for n in linears if type(linears[n]) is nn.Linear and not any(below(n, h) for h in heads)]
    elif isinstance(targets, str):
        found = [name for name in linears if fullmatch(targets, name)]
    else:
        found = [name for name in linears if any(matches(name, target) for target in targets)]
        for target in targets:
            if not any(matches(name, target) for name in found):
                raise UserError(_no_match(model, target, linears))
    if config.layers_to_transform is not None:
        found = [name for name in found if _layer_number(name) in config.layers_to_transform]
    if not found and targets:
        message = _no_match(model, targets, linears, config.layers_to_transform)
        hint = " (one string is a regular expression for the whole name; write a tuple of names)"
        raise UserError(message + hint * (isinstance(targets, str) and targets != "all-linear"))
    for name in found:
        _refuse_unadaptable(model, name, spared)
    return found


def _refuse_unadaptable(model: nn.Module, name: str, spared: list[str]) -> None:
    """UserError where LoRA at `name` would have no effect, or would leave out what the layer does
    beside W x + b."""
    layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise UserError(
            f"inject_lora: {name!r} belongs to an nn.MultiheadAttention, which reads the weights of its "
            "projections instead of calling them: LoRA would have no effect. Target other layers, or use a "
            "model with separate q_proj, k_proj, v_proj and out_proj, such as those of reference_models."
        )
    if type(layer).forward is not nn.Linear.forward:
        raise UserError(
            f"inject_lora: {name!r} is a {type(layer).__name__}, which computes something else than W x + b "
            "(a quantised layer?); LoRA cannot take its place. Target other layers."
        )
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise UserError(
            f"inject_lora: {name!r} has forward hooks (pruning, weight norm, your own?), which LoRA would not "
            "call; remove them first, and register your own on the adapted layer."
        )
    if any(below(name, head) for head in spared):
        raise UserError(f"inject_lora: {name!r} is both in target_modules and in modules_to_save; choose one")


def matches(name: str, target: str) -> bool:
    """True if `target` is `name`, its end after a dot, or "first.rest" with `name` below first and
    ending in rest."""
    first, _, rest = target.partition(".")
    return ends(name, target) or bool(rest) and name.startswith(first + ".") and ends(name, rest)


def saved_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Full names of the modules (or parameters) of `modules_to_save`; UserError where a name finds
    nothing. A full name is that module alone, others are all whose names end so."""
    known = [name for name, _ in model.named_modules() if name] + [name for name, _ in model.named_parameters()]
    found = {
        target: [target] if target in known else [name for name in known if ends(name, target)]
        for target in config.modules_to_save
    }
    for target, names in found.items():
        if not names:
            top = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"inject_lora: modules_to_save names {target!r}, which is not in this model; it has {top}")
    return [name for names in found.values() for name in names]


def ends(name: str, suffix: str) -> bool:
    """Whether a dotted name is `suffix` or ends with it: a.q_proj ends in q_proj, a.xq_proj not."""
    return name == suffix or name.endswith("." + suffix)


def below(name: str, module: str) -> bool:
    """Whether a dotted name is that of `module` or of something in it."""
    return name == module or name.startswith(module + ".")


def _layer_number(name: str) -> int | None:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return int(numbers[-1]) if numbers else None


def _no_match(model: nn.Module, targets, linears: dict, layers=None) -> str:
    kinds = {type(module).__name__ for name, module in model.named_modules() if ends(name, str(targets))}
    if kinds:
        return f"inject_lora: target {targets!r} is a {kinds.pop()}, not an nn.Linear; choose {_choices(linears)}"
    if all(any(below(name, head) for head in getattr(model, "head_modules", HEADS)) for name in linears):
        return (
            f"inject_lora: {type(model).__name__} has no linear layer but its head, so LoRA has no place in it; train "
            "the head alone (--mode linear), or everything (--mode full)"
        )
    where = "" if layers is None else f" in layers {list(layers)}"
    return f"inject_lora: target {targets!r} matches no linear layer{where}; this model has {_choices(linears)}"


def _choices(linears: dict) -> str:
    kinds = Counter(name.rpartition(".")[2] for name in linears)
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.items()) or "none at all"
