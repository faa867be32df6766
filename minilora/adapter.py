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
minilora/foreign.py.
"""

import json
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import nn

from minilora.atomic import atomic_write, write_json, write_safetensors
from minilora.errors import UserError
from minilora.inject import NORMS, LoRAConfig, inject_lora, lora_layers, lora_state_dict
from minilora.targets import ends

__all__ = ["atomic_write", "export_adapter", "load_adapter", "save_adapter", "write_safetensors"]
PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: str | Path) -> Path:
    """Write every trainable tensor of `model`, and the configuration to rebuild its adapters. Returns the
    directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor for name, tensor in lora_state_dict(model).items()}
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"save_adapter: {bad[0]} holds NaN or infinite values; nothing was written")
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    write_json(directory / "adapter_config.json", adapter_config(model))
    return directory


def adapter_config(model: nn.Module) -> dict:
    """The content of adapter_config.json. Targets are written so that PEFT's own rule finds the same
    layers.
    """
    config = getattr(model, "lora_config", None) or LoRAConfig(target_modules=())
    adapted = [name for name, _ in lora_layers(model)]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] + adapted
    linears = [name for name in linears if not name.endswith((".base_layer", ".lora_A", ".lora_B"))]
    short = sorted({name.rpartition(".")[2] for name in adapted})
    exact = [name for name in linears if any(ends(name, target) for target in short)]
    values = {
        field.name: getattr(config, field.name) for field in fields(config) if field.name != "train_norms"
    }
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
    """Modules whose parameters are trained in full: those of modules_to_save, a trained head, trained
    norms.
    """
    modules = list(config.modules_to_save)
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False)]
        if (
            own
            and all(p.requires_grad for p in own)
            and ".lora_" not in name
            and not hasattr(module, "base_layer")
        ):
            if (isinstance(module, NORMS) or not config.target_modules) and name not in modules:
                modules.append(name)
    return modules


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Fill `model` with an adapter, ours or PEFT's (also one trained on transformers or timm); returns the
    model.

    A plain model gets LoRA injected as the file says. One that has LoRA must have the same layers, ranks and
    scaling. Missing, unexpected and wrong-shape tensors are told in one UserError, and the model is left as
    it was.
    """
    directory = Path(directory)
    config, tensors = read_adapter(directory)
    if unknown := [name for name in tensors if not _has_place(model, name)]:
        from minilora.foreign import adapter_to_ours  # names of transformers, timm: only when they are met

        config, tensors = adapter_to_ours(model, config, tensors, unknown, str(directory))
    elif not isinstance(config.target_modules, str):
        adapted = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
        config = replace(config, target_modules=tuple(adapted), layers_to_transform=None)
    _check_shapes(model, config, tensors, directory)
    if not any(True for _ in lora_layers(model)):
        inject_lora(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])
    return model


def export_adapter(model: nn.Module, directory: str | Path, layout: str = "transformers5") -> Path:
    """Write the adapter with the names of another library, for `PeftModel.from_pretrained` on its model.

    layout: one of the model's, such as "transformers5", "transformers4", "timm". See minilora/foreign.py.
    """
    from minilora.foreign import export_adapter as export

    return export(model, Path(directory), layout)


def read_adapter(directory: Path) -> tuple[LoRAConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of an adapter directory, "base_model.model." taken off the names."""
    path = directory / "adapter_config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        file = directory / "adapter_model.safetensors"
        tensors = parse_safetensors(file.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{directory}: not an adapter directory: {Path(error.filename).name} is missing"
        ) from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{directory}: the adapter cannot be read (truncated or damaged?): {error}") from None
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type must be LORA, found {data.get('peft_type') if isinstance(data, dict) else data!r}"
        )
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {name} holds NaN or infinite values; the file is damaged")
    return config_from_json(data, path), {
        name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()
    }


def config_from_json(data: dict, path: Path) -> LoRAConfig:
    """The LoRAConfig in PEFT's adapter_config.json; UserError names a setting that changes the mathematics
    unknown to us.
    """
    changing = (
        "fan_in_fan_out",
        "lora_bias",
        "layer_replication",
        "target_parameters",
        "trainable_token_indices",
    )
    changing += (
        "use_qalora",
        "use_bdlora",
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "velora_config",
    )
    for key in changing:
        if data.get(key):
            raise UserError(
                f"{path}: {key} = {data[key]!r} is not plain LoRA, rsLoRA or DoRA; minilora cannot load it"
            )
    init = data.get("init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal"):
        raise UserError(
            f"{path}: init_lora_weights = {init!r} changed the base weights; convert it to plain LoRA with PEFT"
        )
    known = {field.name for field in fields(LoRAConfig)} - {"init_lora_weights", "train_norms"}
    try:
        return LoRAConfig(
            **{"lora_alpha": 8} | {key: data[key] for key in known if data.get(key) is not None}
        )
    except TypeError as error:
        raise UserError(f"{path}: {error}") from None


def _has_place(model: nn.Module, name: str) -> bool:
    """True if a tensor of an adapter file belongs to a parameter, or to an adapter that inject_lora would
    make.
    """
    module = (
        name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0].removesuffix(".base_layer")
    )
    try:
        found = model.get_submodule(module)
    except AttributeError:
        return False
    return ".lora_" not in name or isinstance(found, nn.Linear) or hasattr(found, "lora_A")


def _check_shapes(model: nn.Module, config: LoRAConfig, tensors: dict, directory: Path) -> None:
    """Compare the file with the shapes that the model has, or would have after injection; one message for
    all.
    """
    if any(True for _ in lora_layers(model)):
        trained = model
        for name, layer in lora_layers(model):
            options = config.layer_options(name)
            wanted = options["lora_alpha"] / (options["r"] ** 0.5 if config.use_rslora else options["r"])
            if name + ".lora_A.weight" in tensors and abs(wanted - layer.scaling) > 1e-6 * abs(wanted):
                raise UserError(
                    f"{directory}: scaling of {name} is {wanted:g} in the file, {layer.scaling:g} in the model"
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
    """A copy of the model without storage, LoRA injected: shapes can be checked before anything is
    touched.
    """
    import copy

    memo = {id(t): nn.Parameter(t.detach().to("meta"), requires_grad=False) for t in model.parameters()}
    memo |= {id(t): t.to("meta") for t in model.buffers()}
    return inject_lora(copy.deepcopy(model, memo), config)


def most_common(values: list):
    """The value that occurs most often, the first of equals."""
    return Counter(values).most_common(1)[0][0]
