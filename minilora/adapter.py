"""Adapter files: everything that was trained, in PEFT's layout, loaded strictly.

    save_adapter(model, "run")       # adapter_config.json + adapter_model.safetensors
    load_adapter(model, "run")       # a plain model gets LoRA as the file says, then the values

A tensor's name is "base_model.model." + the parameter's name in the model:
    base_model.model.blocks.0.attn.q_proj.lora_A.weight             (r, in)
    base_model.model.blocks.0.attn.q_proj.lora_B.weight             (out, r)
    base_model.model.blocks.0.attn.q_proj.lora_magnitude_vector     (out,) with use_dora
    base_model.model.blocks.0.attn.q_proj.base_layer.bias           (out,) with bias="lora_only"
    base_model.model.head.weight, .bias                             a module of modules_to_save
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. What a file must have to fit:
formats/checks.py. Names of other libraries: formats/foreign.py.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from minilora.atomic import write_json, write_safetensors
from minilora.errors import UserError
from minilora.formats import foreign
from minilora.formats.checks import check_fit, has_place, modules_to_save_here
from minilora.formats.peft import PREFIX, adapter_config, read_adapter
from minilora.inject import inject_lora, lora_layers, lora_state_dict


def save_adapter(model: nn.Module, directory: str | Path) -> Path:
    """Write every trainable tensor of `model`, and the configuration to rebuild its adapters.

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
    ranks and scaling. Missing, unexpected and wrong-shape tensors are reported in one UserError,
    and the model is left as it was.
    """
    directory = Path(directory)
    config, tensors, trained_on = read_adapter(directory)
    if unknown := [name for name, tensor in tensors.items() if not has_place(model, name, tensor)]:
        config, tensors = foreign.adapter_to_ours(model, config, tensors, unknown, str(directory), trained_on)
    config = replace(config, modules_to_save=modules_to_save_here(model, config.modules_to_save, tensors))
    check_fit(model, config, tensors, directory)
    if not any(True for _ in lora_layers(model)):
        inject_lora(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])
    return model


def export_adapter(model: nn.Module, directory: str | Path, layout: str = "transformers5") -> Path:
    """Write the adapter with another library's names, for PeftModel.from_pretrained on its model.

    layout: one of the model's: "timm", "transformers5" (the names of transformers since 5.10,
    DINOv2's since 5.18), "transformers4" (those before). Returns the directory. Raises UserError
    for a layout without a place for something that was trained.
    """
    return foreign.export_adapter(model, Path(directory), layout)
