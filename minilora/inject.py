"""Put LoRA into a model: choose the linear layers by name, replace each by a LoRALinear,
freeze the rest.

    model = inject_lora(model, LoRAConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")))
    print(count_parameters(model))
    plain = merge_lora(model)          # nn.Linear again, W + s B A

Works on any nn.Module whose layers are called; the names and meanings of the configuration are
PEFT's (https://huggingface.co/docs/peft, LoraConfig).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from minilora.dora import DoRALinear
from minilora.errors import UserError
from minilora.lora import LoRALinear
from minilora.lora_config import check_values
from minilora.speed.dropout import InputDropout
from minilora.targets import below, find_targets, from_pattern, saved_modules

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.RMSNorm)


@dataclass
class LoRAConfig:
    """What to adapt and how. Field names and meanings are those of PEFT's LoraConfig,
    plus `train_norms`.

    r, lora_alpha, lora_dropout: rank, scale (alpha / r; use_rslora: alpha / sqrt(r),
    arXiv:2312.03732), dropout of x.
    target_modules: names of linear layers; each is a full dotted name or its end ("q_proj" takes every layer called
      q_proj, never xq_proj); "vision.q_proj" takes those below `vision`. One string is a regular expression
      that must match the whole name; "all-linear" takes every nn.Linear outside the head.
    modules_to_save: modules trained in full and stored with the adapter, such as the
    classification head.
    layers_to_transform: numbers of the layers to adapt (the last number in the dotted
    name), None for all.
    rank_pattern, alpha_pattern: {regular expression for the name's end: another r or lora_alpha}.
    use_dora: learn magnitude and direction apart, arXiv:2402.09353; dora.py has the equation.
    bias: "none", "lora_only" (biases of the adapted layers are trained) or "all" (every bias is).
    init_lora_weights: True (B = 0), "gaussian" (B = 0, A normal), False (B random, for tests).
    train_norms: train the weights and biases of all normalisation layers too.

    Raises UserError for a value that no layer can have, naming the field.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    bias: str = "none"
    train_norms: bool = False

    def __post_init__(self):
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = (self.layers_to_transform,)
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = (self.modules_to_save,)
        for name in ("target_modules", "modules_to_save", "layers_to_transform"):
            if isinstance(getattr(self, name), (list, set, frozenset)):
                setattr(self, name, tuple(sorted(getattr(self, name))))
        self.modules_to_save = self.modules_to_save or ()
        check_values(self)

    def layer_options(self, name: str) -> dict:
        """The arguments of LoRALinear for the layer called `name`, patterns applied."""
        return {
            "r": from_pattern(name, self.rank_pattern, self.r),
            "lora_alpha": from_pattern(name, self.alpha_pattern, self.lora_alpha),
            **{key: getattr(self, key) for key in ("lora_dropout", "use_rslora", "init_lora_weights")},
        }


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
    mark_only_lora_as_trainable(model, config)
    model.lora_config = config
    return model


def mark_only_lora_as_trainable(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze everything, then make trainable: adapters, modules_to_save, and biases and
    norms as configured."""
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


def to_full_precision(parameters) -> None:
    """Make half precision parameters float32: what is trained is never float16 or bfloat16 (their
    steps would round away)."""
    for parameter in parameters:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Store the frozen weights of linear and convolution layers in `dtype`, in place; trainable
    tensors stay as they are.

    With autocast to the same dtype the result does not change: autocast would round the same
    weights in every step.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRALinear by a plain nn.Linear with W + delta_weight(), in place, and
    return the model.

    The output is the same up to rounding. A model without LoRA is returned unchanged, so merging
    twice does no harm.
    """
    for name, layer in list(lora_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.merged())
    if hasattr(model, "lora_config"):
        del model.lora_config
    return model


@contextmanager
def disable_lora(model: nn.Module):
    """Within the `with` block y = W x + b: the low-rank paths are off; trained heads, norms
    and biases stay.

    Yields the model. Blocks may stand in one another; an exception switches the paths on
    again as they were.
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
    """Everything that is trained, by parameter name: adapters, head, norms, biases.
    Detached, not copied."""
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
