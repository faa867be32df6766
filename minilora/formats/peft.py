"""adapter_config.json as PEFT writes and reads it, and the reading of both adapter files.

Fields and defaults: PEFT's LoraConfig (https://huggingface.co/docs/peft/package_reference/lora). A
LoRAConfig is a part of it; what PEFT knows beyond is refused where it changes the mathematics and
ignored where it does not.
"""

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
from minilora.textfiles import read_bytes, read_json

PREFIX = "base_model.model."
WEIGHTS = 64 << 30  # bytes of an adapter's tensors, which are read at once

# forms that PEFT no longer writes
OLD_FORMS = {
    "enable_lora": "PEFT 0.2's LoRA on some parts of one qkv layer, whose B is a grouped convolution; train it anew "
    "with a PEFT of today, or on a model with separate q, k and v",
    "fan_in_fan_out": "the adapter was trained on layers that store W transposed (GPT-2's Conv1D), which no model "
    "here has; if yours were plain linear layers, write false",
}
HINTS = {  # what lies in a folder without adapter_model.safetensors
    "adapter_model.bin": "adapter_model.bin is a pickle, which is not opened; convert it where you trust it: python -c "
    '"import torch; from safetensors.torch import save_file; save_file({k: v.contiguous() for k, v in '
    "torch.load('adapter_model.bin', weights_only=True).items()}, 'adapter_model.safetensors')\"",
    "model.safetensors": "it holds a whole model, which goes with --weights",
}


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
        # a parameter of the model itself (CLIP's logit_scale) is in modules_to_save by name
        if not name or name in modules or ".lora_" in name or hasattr(module, "base_layer"):
            continue
        trained = [p.requires_grad for p in module.parameters(recurse=False)]
        if trained and all(trained) and (isinstance(module, NORMS) or not config.target_modules):
            modules.append(name)
    return modules


def read_adapter(directory: Path) -> tuple[LoRAConfig, dict[str, torch.Tensor], str]:
    """Configuration and tensors of an adapter directory, names without "base_model.model."; and the
    class of the model that it was trained on, "" where the file does not say."""
    path, file = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    if missing := next((one.name for one in (path, file) if not one.is_file()), None):
        missing = f"{missing} is missing" if directory.exists() else "it does not exist"
        there = next((name for name in HINTS if (directory / name).exists()), None)
        hint = f"; {HINTS[there]}" if there else ""
        raise UserError(f"{directory}: not an adapter directory: {missing}{hint}")
    try:
        data, tensors = read_json(path), parse_safetensors(read_bytes(file, WEIGHTS))
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{directory}: the adapter cannot be read (truncated or damaged?): {error}") from None
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        found = data.get("peft_type") if isinstance(data, dict) else data
        raise UserError(f"{path}: peft_type must be LORA, found {found!r}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {name} holds NaN or infinite values; the file is damaged")
    if old := next((name for name, t in tensors.items() if name.endswith("lora_B.weight") and t.dim() == 3), None):
        raise UserError(f"{file}: {old} has three dimensions: {OLD_FORMS['enable_lora']}")
    # of a saved head with bias "all" PEFT stores its wrapper's tensors too, which say nothing new
    tensors = {name.removeprefix(PREFIX): t for name, t in tensors.items() if ".original_module." not in name}
    tensors = {name.replace(".modules_to_save.", "."): tensor for name, tensor in tensors.items()}
    config = config_from_json(data, path)
    # PEFT's ways to spare some of the targets: the file's names say what is left
    if data.get("exclude_modules") or data.get("layers_pattern"):
        adapted = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
        config = replace(config, target_modules=tuple(adapted), layers_to_transform=None)
    trained_on = data.get("auto_mapping")
    return config, tensors, str(trained_on.get("base_model_class")) if isinstance(trained_on, dict) else ""


def config_from_json(data: dict, path: Path) -> LoRAConfig:
    """The LoRAConfig in PEFT's adapter_config.json; UserError for mathematics unknown here."""
    for key, sentence in OLD_FORMS.items():
        if data.get(key):
            raise UserError(f"{path}: {key} = {data[key]!r} is not plain LoRA: {sentence}")
    changing = ("lora_bias", "layer_replication", "target_parameters", "trainable_token_indices")
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
