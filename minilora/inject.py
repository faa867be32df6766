"""Put LoRA into a model: choose layers by name, replace each by a LoRALinear, freeze the rest.

    model = inject_lora(model, LoRAConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")))
    print(count_parameters(model))
    plain = merge_lora(model)          # nn.Linear again, W + s B A

Works on any nn.Module whose layers are called; the names and meanings of the configuration are
PEFT's (https://huggingface.co/docs/peft, LoraConfig).
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from minilora.dora import DoRALinear
from minilora.errors import UserError
from minilora.lora import LoRALinear
from minilora.lora_config import LoRAConfig
from minilora.speed.dropout import InputDropout
from minilora.targets import below, find_targets, saved_modules

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.RMSNorm)


def inject_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Replace the targeted nn.Linear layers of `model` by LoRALinear (or DoRALinear), in place, and
    return the model.

    Afterwards only the adapters, `modules_to_save` and what `bias` and `train_norms` ask for
    require gradients. The model keeps its device, train/eval mode and base precision;
    `model.lora_config` is the configuration. Raises UserError if the model already has LoRA, if a
    target matches no linear layer (the choices are listed), or if a target's weights are read
    directly by its parent so that LoRA would have no effect.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UserError("inject_lora: this model already has LoRA layers; call merge_lora first, or load a fresh model")
    layer_class = DoRALinear if config.use_dora else LoRALinear
    # one per parent module: siblings that read the same x share the mask
    dropouts: dict[str, InputDropout] = {}
    for name in find_targets(model, config):
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = layer_class(getattr(parent, child), **config.layer_options(name))
        if config.lora_dropout:
            layer.lora_dropout = dropouts.setdefault(parent_name, layer.lora_dropout).train(layer.training)
        setattr(parent, child, layer)
    _leave_fast_path(model)
    mark_only_lora_as_trainable(model, config)
    model.lora_config = config
    return model


def _leave_fast_path(model: nn.Module) -> None:
    """In eval mode torch's encoder layers read the weights of their parts instead of calling them;
    those with LoRA inside compute as in training."""
    for module in model.modules():
        inside = isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
        if inside and next(lora_layers(module), None):
            module.activation_relu_or_gelu, module.use_nested_tensor = 0, False


def mark_only_lora_as_trainable(model: nn.Module, config: LoRAConfig) -> None:
    """Set for every parameter whether it is trained: adapters, modules_to_save, and biases and
    norms as configured; all others are frozen."""
    saved = saved_modules(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            bool(re.search(r"(^|\.)lora_(A\.weight|B\.weight|magnitude_vector)$", name))
            or any(below(name, module) for module in saved)
            or (config.bias == "all" and name.endswith("bias"))
            or (config.bias == "lora_only" and name.endswith("base_layer.bias"))
        )
    if config.train_norms:
        for module in model.modules():
            if isinstance(module, NORMS):
                module.requires_grad_(True)
    to_full_precision(parameter for parameter in model.parameters() if parameter.requires_grad)


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRALinear by a plain nn.Linear with W + delta_weight(), in place.

    Returns the model; its output is the same up to rounding. A model without LoRA is returned
    unchanged, so merging twice does no harm.
    """
    for name, layer in list(lora_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.merged())
    if hasattr(model, "lora_config"):
        del model.lora_config
    return model


@contextmanager
def disable_lora(model: nn.Module):
    """Within the `with` block the low-rank paths are off: y = W x + b.

    Trained heads, norms and biases stay. Yields the model. Blocks may be nested; an exception
    leaves the paths as they were before.
    """
    layers = [(layer, layer.enabled) for _, layer in lora_layers(model)]
    try:
        for layer, _ in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, was_enabled in layers:
            layer.enabled = was_enabled


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(dotted name, layer) of every LoRALinear, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything trained, by parameter name: adapters, head, norms, biases. No copies, detached."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


class ParameterCount(NamedTuple):
    """Trainable and all parameters; printed as PEFT prints them."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Numbers, not bytes: every parameter once, adapters included; buffers are not parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes))


def to_full_precision(parameters: Iterable[nn.Parameter]) -> None:
    """Make half precision parameters float32, in place: what is trained is never float16 or
    bfloat16, in which small steps would round to nothing."""
    for parameter in parameters:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Store the frozen weights of linear and convolution layers in `dtype`, in place.

    Returns the model; its trainable tensors stay as they are. With autocast to the same dtype the
    result does not change: autocast would round the same weights in every step.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
    return model
