"""adapter_config.json as PEFT writes and reads it, and the reading of both adapter files.

Fields and defaults: PEFT's LoraConfig (https://huggingface.co/docs/peft/package_reference/lora). A
LoRAConfig is a part of it; what PEFT knows beyond is refused where it changes the mathematics and
ignored where it does not.
"""

import json
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import nn

from minilora.errors import UserError
from minilora.inject import NORMS, lora_layers
from minilora.lora_config import LoRAConfig
from minilora.targets import ends

PREFIX = "base_model.model."


def adapter_config(model: nn.Module) -> dict:
    """The content of adapter_config.json, with targets from which PEFT finds the same layers."""
    config = getattr(model, "lora_config", None) or LoRAConfig(target_modules=())
    adapted = [name for name, _ in lora_layers(model)]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] + adapted
    linears = [name for name in linears if not name.endswith((".base_layer", ".lora_A", ".lora_B"))]
    short = sorted({name.rpartition(".")[2] for name in adapted})
    exact = [name for name in linears if any(ends(name, target) for target in short)]
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "train_norms"}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name", None),
        "inference_mode": True,
        "fan_in_fan_out": False,
        **values,
        "target_modules": short if sorted(exact) == sorted(adapted) else adapted,
        "layers_to_transform": None,  # said by the full names in target_modules
        "modules_to_save": _trained_modules(model, config) or None,
    }


def _trained_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Modules that are trained in full: those of modules_to_save, a trained head, trained norms."""
    modules = list(config.modules_to_save)
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False)]
        if (
            own
            # a parameter of the model itself (CLIP's logit_scale) is in modules_to_save by name
            and name
            and all(p.requires_grad for p in own)
            and ".lora_" not in name
            and not hasattr(module, "base_layer")
        ):
            if (isinstance(module, NORMS) or not config.target_modules) and name not in modules:
                modules.append(name)
    return modules


def read_adapter(directory: Path) -> tuple[LoRAConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of an adapter directory, names without "base_model.model."."""
    path = directory / "adapter_config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        file = directory / "adapter_model.safetensors"
        tensors = parse_safetensors(file.read_bytes())
    except FileNotFoundError as error:
        missing = f"{Path(error.filename).name} is missing" if directory.exists() else "it does not exist"
        whole = (directory / "model.safetensors").exists()
        hint = "; it holds a whole model, which goes with --weights" if whole else ""
        raise UserError(f"{directory}: not an adapter directory: {missing}{hint}") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{directory}: the adapter cannot be read (truncated or damaged?): {error}") from None
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        found = data.get("peft_type") if isinstance(data, dict) else data
        raise UserError(f"{path}: peft_type must be LORA, found {found!r}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {name} holds NaN or infinite values; the file is damaged")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    config = config_from_json(data, path)
    # PEFT's way to spare some of the targets: the file's names say what is left
    if data.get("exclude_modules"):
        adapted = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
        config = replace(config, target_modules=tuple(adapted))
    return config, tensors


def config_from_json(data: dict, path: Path) -> LoRAConfig:
    """The LoRAConfig in PEFT's adapter_config.json; UserError names a setting that changes the
    mathematics in a way unknown here."""
    changing = ("fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices")
    changing += ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config")
    for key in changing:
        if data.get(key):
            raise UserError(f"{path}: {key} = {data[key]!r} is not plain LoRA, rsLoRA or DoRA; minilora cannot load it")
    init = data.get("init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal"):
        raise UserError(
            f"{path}: init_lora_weights = {init!r} changed the base weights; convert it to plain LoRA with PEFT"
        )
    known = {field.name for field in fields(LoRAConfig)} - {"init_lora_weights", "train_norms"}
    try:
        return LoRAConfig(**{"lora_alpha": 8} | {key: data[key] for key in known if data.get(key) is not None})
    except TypeError as error:
        raise UserError(f"{path}: {error}") from None
