"""Whether an adapter fits a model: every tensor has its place, none is missing, all shapes agree.

All of it is checked before the model is touched, so that a wrong file changes nothing.
"""

import copy
from pathlib import Path

from torch import Tensor, nn

from minilora.errors import UserError
from minilora.inject import inject_lora, lora_layers, lora_state_dict
from minilora.lora_config import LoRAConfig
from minilora.targets import below, ends


def modules_to_save_here(model: nn.Module, names: tuple[str, ...], tensors: dict) -> tuple[str, ...]:
    """PEFT's `modules_to_save`, read with PEFT's rules, as the names that mean the same here.

    PEFT lists the heads of all models for a task ("classifier", "score"): those that are not here
    are left out. For PEFT a name means all modules that end so ("norm" is "layers.1.norm" too);
    here a full name is that module alone, so the others are added if the file has tensors of them.
    """
    here = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    meant = {name: [full for full in here if ends(full, name)] for name in names}
    beside_full_names = {full for name in names if name in here for full in meant[name]} - {*names}
    added = [full for full in beside_full_names if any(below(tensor, full) for tensor in tensors)]
    return (*(name for name in names if meant[name]), *sorted(added))


def has_place(model: nn.Module, name: str, tensor: Tensor) -> bool:
    """True if a tensor of an adapter file belongs to a parameter of the model, or to an adapter
    that inject_lora would make. A convolution's has four dimensions: another library's form."""
    if tensor.dim() > 2:
        return False
    module = name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0].removesuffix(".base_layer")
    try:
        found = model.get_submodule(module)
    except AttributeError:
        return False
    return ".lora_" not in name or isinstance(found, nn.Linear) or hasattr(found, "lora_A")


def check_fit(model: nn.Module, config: LoRAConfig, tensors: dict, directory: Path) -> None:
    """UserError where the file's tensors are not those that the model trains, or would train."""
    adapted = dict(lora_layers(model))
    for name, layer in adapted.items():
        options = config.layer_options(name)
        wanted = options["lora_alpha"] / (options["r"] ** 0.5 if config.use_rslora else options["r"])
        if name + ".lora_A.weight" in tensors and abs(wanted - layer.scaling) > 1e-6 * abs(wanted):
            raise UserError(
                f"{directory}: scaling of {name} is {wanted:g} in the file, {layer.scaling:g} in the model; "
                "inject with the file's lora_alpha"
            )
    trained = model if adapted else _injected_without_memory(model, config)
    own = {name: tuple(tensor.shape) for name, tensor in lora_state_dict(trained).items()}
    file = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "missing": [name for name in own if name not in file],
        "unexpected": [name for name in file if name not in own],
        "wrong shape": [f"{n} {file[n]}, model {own[n]}" for n in own if n in file and own[n] != file[n]],
    }
    if any(problems.values()):
        found = [f"{what} {len(names)}: {', '.join(names[:5])}" for what, names in problems.items() if names]
        raise UserError(f"{directory}: the adapter does not fit this model; {'; '.join(found)}")


def _injected_without_memory(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """A copy of the model with LoRA injected, its tensors on the meta device: shapes alone."""
    # deepcopy takes from `memo` what it should not copy itself
    memo = {id(t): nn.Parameter(t.detach().to("meta"), requires_grad=False) for t in model.parameters()}
    memo |= {id(t): t.to("meta") for t in model.buffers()}
    return inject_lora(copy.deepcopy(model, memo), config)
