"""Structured pruning: remove whole MLP units; what is left is a smaller dense model, really faster.

Unit j of fc2(act(fc1(x))) is row j of fc1 and column j of fc2. Over data, its contribution a_j
w_j (activation times column) has a mean, which moves into fc2's bias, and a rest of power
Var(a_j) |w_j|^2, which is lost: the units with the smallest rest go. Without data the score is
|row j| |column j|.

    small = remove_mlp_units(model, 0.5, lambda: model(images))
    save_pretrained(small, "small")     # an ordinary checkpoint; train.py --model small repairs it

All MLPs of a tower lose the same share, so the configuration still says everything: hidden = fewer.
Removing units by what they contribute: Molchanov et al. 2017, arXiv:1611.06440. Shapes: d
width, h hidden units.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from minilora.compress.prune import check_sparsity
from minilora.errors import UserError
from minilora.inject import merge_lora

# fields of a configuration that count MLP units
HIDDEN = ("hidden", "vision_hidden", "text_hidden")


def remove_mlp_units(model: nn.Module, sparsity: float, run: Callable[[], object] | None = None) -> nn.Module:
    """Take away the share `sparsity` of the units of every MLP, in place; LoRA is merged first.
    Returns the model.

    run: passes some data through the model, for scores and bias correction. `model.config` and
    those of its towers say the new sizes, so save_pretrained and load_pretrained work as ever.
    Raises UserError for a share outside [0, 1) and for a model without MLPs of a configurable size.
    """
    check_units(model, sparsity)
    mlps = mlp_layers(merge_lora(model))
    activity = measure_units(mlps, run) if run is not None else {}
    for name, mlp in mlps.items():
        shrink_mlp(mlp, units_kept(mlp.fc1.out_features, sparsity), *activity.get(name, ()))
    for module in model.modules():  # the model and its towers
        if is_dataclass(getattr(module, "config", None)):
            module.config = smaller_config(module.config, sparsity)
    return model


def check_units(model: nn.Module, sparsity: float) -> None:
    """UserError for a share outside [0, 1), and for a model whose config counts no MLP units."""
    check_sparsity(sparsity)
    if smaller_config(model.config, 0.5) == model.config:
        name = type(model).__name__
        raise UserError(f"{name} has no MLP units to remove; prune it with a scope of single weights")


def mlp_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} of every fc2(act(fc1(x)))."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "fc1") and hasattr(module, "fc2")}


def units_kept(hidden: int, sparsity: float) -> int:
    """How many of `hidden` units stay, at least one."""
    return max(1, hidden - round(sparsity * hidden))


def smaller_config(config, sparsity: float):
    """The configuration with fewer MLP units, also in the towers that it holds."""
    changes = {}
    names = {field.name for field in fields(config)}
    for name in names:
        value = getattr(config, name)
        if is_dataclass(value):
            changes[name] = smaller_config(value, sparsity)
        # a fusion's hidden layer is no MLP
        elif name in HIDDEN and (name != "hidden" or "heads" in names):
            changes[name] = units_kept(value, sparsity)
    return replace(config, **changes)


@torch.no_grad()
def measure_units(mlps: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (mean, variance)}, each (h,), of the units' activations over the data of `run`."""
    sums: dict[str, list] = {}

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = output.detach().double().flatten(0, -2)  # (tokens, h)
        old = sums.get(name, [0, 0.0, 0.0])
        sums[name] = [old[0] + len(rows), old[1] + rows.sum(0), old[2] + rows.square().sum(0)]

    hooks = [mlp.act.register_forward_hook(partial(add, name)) for name, mlp in mlps.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: total / n for name, (n, total, _) in sums.items()}
    return {
        name: (means[name], (squares / n - means[name] ** 2).clamp(min=0)) for name, (n, _, squares) in sums.items()
    }


@torch.no_grad()
def shrink_mlp(mlp: nn.Module, keep: int, mean: Tensor | None = None, variance: Tensor | None = None) -> None:
    """Keep the `keep` most important units, in their order; fc2's bias gets the others' mean."""
    fc1, fc2 = mlp.fc1, mlp.fc2
    columns = fc2.weight.double().norm(dim=0)  # (h,)
    rest = fc1.weight.double().norm(dim=1) if variance is None else variance.sqrt()  # (h,)
    kept = (rest * columns).argsort(descending=True, stable=True)[:keep].sort().values
    gone = torch.ones(fc1.out_features, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    if mean is not None and fc2.bias is not None:
        fc2.bias.copy_(fc2.bias.double() + fc2.weight[:, gone].double() @ mean[gone])
    fc1.out_features = fc2.in_features = keep
    for layer, key, dim in ((fc1, "weight", 0), (fc1, "bias", 0), (fc2, "weight", 1)):
        if (old := getattr(layer, key)) is not None:
            setattr(layer, key, nn.Parameter(old.index_select(dim, kept), old.requires_grad))
