"""Adapter files: everything that was trained, in PEFT's layout, loaded strictly.

    save_adapter(model, "run")       # adapter_config.json + adapter_model.safetensors
    load_adapter(model, "run")       # injects what the file says if the model is plain, then fills it

A tensor's name is "base_model.model." + the parameter's name in the model:
    base_model.model.blocks.0.attn.q_proj.lora_A.weight     (r, in)
    base_model.model.blocks.0.attn.q_proj.lora_B.weight     (out, r)
    base_model.model.head.weight, .bias                     a module of modules_to_save
    ....q_proj.lora_magnitude_vector (out,), ....q_proj.base_layer.bias       with use_dora, with
    bias="lora_only"
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. Names of other libraries:
minilora/formats/foreign.py.
"""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from minilora.atomic import atomic_write, write_json, write_safetensors
from minilora.errors import UserError
from minilora.formats.peft import PREFIX, adapter_config, read_adapter
from minilora.inject import LoRAConfig, inject_lora, lora_layers, lora_state_dict
from minilora.targets import below, ends

__all__ = ["atomic_write", "export_adapter", "load_adapter", "save_adapter", "write_safetensors"]


def save_adapter(model: nn.Module, directory: str | Path) -> Path:
    """Write every trainable tensor of `model`, and the configuration to rebuild its adapters, as
    PEFT lays them out.

    adapter_model.safetensors and adapter_config.json, each whole or not at all. Returns the
    directory. Raises UserError for NaN or infinity in a tensor, RunError where the disk is full.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor for name, tensor in lora_state_dict(model).items()}
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"save_adapter: {bad[0]} holds NaN or infinite values; nothing was written")
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    write_json(directory / "adapter_config.json", adapter_config(model))
    return directory


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Fill `model` with an adapter, ours or PEFT's (also one trained on transformers or timm);
    returns the model.

    A plain model gets LoRA injected as the file says. One that has LoRA must have the same layers,
    ranks and scaling. Missing, unexpected and wrong-shape tensors are told in one UserError, and
    the model is left as it was.
    """
    directory = Path(directory)
    config, tensors = read_adapter(directory)
    if unknown := [name for name in tensors if not _has_place(model, name)]:
        # names of transformers, timm: only when they are met
        from minilora.formats.foreign import adapter_to_ours

        config, tensors = adapter_to_ours(model, config, tensors, unknown, str(directory))
    config = replace(config, modules_to_save=_present(model, config.modules_to_save, tensors))
    _check_shapes(model, config, tensors, directory)
    if not any(True for _ in lora_layers(model)):
        inject_lora(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])
    return model


def export_adapter(model: nn.Module, directory: str | Path, layout: str = "transformers5") -> Path:
    """Write the adapter with the names of another library, for
    `PeftModel.from_pretrained` on its model.

    layout: one of the model's, such as "transformers5", "transformers4", "timm". Returns the
    directory. Raises UserError for a layout without a place for something that was trained. See
    minilora/formats/foreign.py.
    """
    from minilora.formats.foreign import export_adapter as export

    return export(model, Path(directory), layout)


def _present(model: nn.Module, names: tuple[str, ...], tensors: dict) -> tuple[str, ...]:
    """Those of `names` that the model has: PEFT lists every head of a task type
    ("classifier", "score").

    A full name is also the end of others for PEFT ("norm": "layers.1.norm" too); those come in if
    the file has them.
    """
    own = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    ending = {name: [full for full in own if ends(full, name)] for name in names}
    named = {full for name in names if name in own for full in ending[name]}
    others = [full for full in named - {*names} if any(below(tensor, full) for tensor in tensors)]
    return (*(name for name in names if ending[name]), *sorted(others))


def _has_place(model: nn.Module, name: str) -> bool:
    """True if a tensor of an adapter file belongs to a parameter, or to an adapter that
    inject_lora would make."""
    module = name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0].removesuffix(".base_layer")
    try:
        found = model.get_submodule(module)
    except AttributeError:
        return False
    return ".lora_" not in name or isinstance(found, nn.Linear) or hasattr(found, "lora_A")


def _check_shapes(model: nn.Module, config: LoRAConfig, tensors: dict, directory: Path) -> None:
    """Compare the file with the shapes that the model has, or would have after injection; one
    message for all."""
    if any(True for _ in lora_layers(model)):
        trained = model
        for name, layer in lora_layers(model):
            options = config.layer_options(name)
            wanted = options["lora_alpha"] / (options["r"] ** 0.5 if config.use_rslora else options["r"])
            if name + ".lora_A.weight" in tensors and abs(wanted - layer.scaling) > 1e-6 * abs(wanted):
                raise UserError(
                    f"{directory}: scaling of {name} is {wanted:g} in the file, {layer.scaling:g} in the model; "
                    "inject with the file's lora_alpha"
                )
    else:
        trained = _skeleton(model, config)
    own = {name: tuple(tensor.shape) for name, tensor in lora_state_dict(trained).items()}
    file = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "missing": [name for name in own if name not in file],
        "unexpected": [name for name in file if name not in own],
        "wrong shape": [f"{n} {file[n]}, model {own[n]}" for n in own if n in file and own[n] != file[n]],
    }
    if any(problems.values()):
        told = [f"{what} {len(names)}: {', '.join(names[:5])}" for what, names in problems.items() if names]
        raise UserError(f"{directory}: the adapter does not fit this model; {'; '.join(told)}")


def _skeleton(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """A copy of the model without storage, LoRA injected: shapes can be checked before
    anything is touched."""
    memo = {id(t): nn.Parameter(t.detach().to("meta"), requires_grad=False) for t in model.parameters()}
    memo |= {id(t): t.to("meta") for t in model.buffers()}
    return inject_lora(copy.deepcopy(model, memo), config)
