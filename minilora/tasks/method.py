"""From flags to LoRA in the model: --mode, --lora-r, --target-modules and what belongs to them.

    resolve(config, default_model)          what the user left open gets its value
    model, record = load_base(...)          the pretrained model (weights.py)
    make_trainable(model, config, heads)    what is trained requires gradients, the rest is frozen

--mode lora trains low-rank updates B A of the targeted layers and the heads, linear the heads
alone, full everything. `heads` are the names of modules that are new for this task.
"""

import os
from typing import Any

from torch import nn

from minilora.adapter import load_adapter
from minilora.errors import UserError
from minilora.inject import cast_frozen, inject_lora, mark_only_lora_as_trainable, merge_lora
from minilora.lora_config import LoRAConfig
from minilora.settings.flags import DEFAULT_LR, DEFAULT_TARGETS, Config
from minilora.settings.parse import given
from minilora.settings.values import option
from minilora.speed.gemm import speed_up
from minilora.tasks.weights import absolute
from minilora.training.device import DTYPES


def resolve(config: Config, default_model: Any) -> None:
    """Fill in what depends on other flags: the model, its targets, the learning
    rate, absolute paths."""
    config.given = given(config)
    config.model = config.model or default_model
    config.target_modules = config.target_modules or DEFAULT_TARGETS[config.task]
    config.lr = config.lr or DEFAULT_LR[config.mode]
    if config.steps_per_shot:
        config.max_steps = config.steps_per_shot * config.shots
    for name in ("data_dir", "adapter", "teacher", "tokenizer", "distill_unlabelled"):
        if getattr(config, name):
            setattr(config, name, os.path.abspath(getattr(config, name)))
    if isinstance(config.weights, dict):
        config.weights = {tower: absolute(path) for tower, path in config.weights.items()}
    else:
        config.weights = absolute(config.weights)


def one_value(config: Config, name: str) -> Any:
    """A flag of a model with one encoder; UserError for `vision=A text=B`."""
    value = getattr(config, name)
    if isinstance(value, dict):
        raise UserError(f"{option(name)} names towers, but --task {config.task} has one encoder; give one value")
    return value


def lora_config(config: Config, heads: tuple[str, ...]) -> LoRAConfig:
    """The flags as a LoRAConfig: ranks of two towers are patterns, linear mode adapts no layer."""
    if config.mode == "linear":
        return LoRAConfig(target_modules=(), modules_to_save=heads)
    plain, patterns = {}, {}
    for name, key, pattern in (("lora_r", "r", "rank_pattern"), ("lora_alpha", "lora_alpha", "alpha_pattern")):
        value = getattr(config, name)
        if isinstance(value, dict):
            patterns[pattern] = {rf"{tower}\..*": one for tower, one in value.items()}
        plain[key] = getattr(Config, name) if isinstance(value, dict) else value
    return LoRAConfig(
        **plain,
        **patterns,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules or DEFAULT_TARGETS[config.task],
        modules_to_save=heads,
        layers_to_transform=config.layers,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias=config.train_bias,
        train_norms=config.train_norms,
    )


def make_trainable(model: nn.Module, config: Config, heads: tuple[str, ...]) -> nn.Module:
    """Make trainable what --mode says, in place, and return the model.

    An --adapter is put in first: lora mode trains it further, the other modes merge it into the
    weights. The frozen rest is stored in --base-dtype.
    """
    if config.adapter:
        load_adapter(model, config.adapter)
        config.new_heads = tuple(head for head in heads if head not in model.lora_config.modules_to_save)
    if config.mode == "lora" and config.adapter:
        _same_adapter(model.lora_config, config)
        model.lora_config.modules_to_save += config.new_heads
        mark_only_lora_as_trainable(model, model.lora_config)
    elif config.mode == "full":
        merge_lora(model).requires_grad_(True)
    else:
        inject_lora(merge_lora(model), lora_config(config, heads))
    if config.base_dtype not in (None, "fp32"):
        cast_frozen(model, DTYPES[config.base_dtype])
    if config.grad_checkpointing:
        set_grad_checkpointing(model)
    return speed_up(model)


def _same_adapter(found: LoRAConfig, config: Config) -> None:
    """UserError for a flag that contradicts the --adapter, whose own values hold."""
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "target_modules": "target_modules", "use_dora": "use_dora"}
    for flag, key in names.items():
        wanted, value = getattr(config, flag), getattr(found, key)
        if flag in given(config) and (set(wanted) != set(value) if isinstance(wanted, tuple) else wanted != value):
            raise UserError(
                f"{option(flag)} {wanted}: the adapter {config.adapter} has {key} {value}; leave the flag out"
            )


def set_grad_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass, in every part of the model that can."""
    parts = [module for module in model.modules() if hasattr(module, "grad_checkpointing")]
    if not parts:
        raise UserError(f"--grad-checkpointing: {type(model).__name__} does not support it; leave it out")
    for module in parts:
        module.grad_checkpointing = True
