"""Magnitude pruning: the smallest weights of each tensor become zero and stay zero.

    pruner = Pruner(model, "conv", sparsity=0.8, start=0.5, steps=200)
    pruner.attach(optimizer)          # after every step: the schedule's sparsity, masks re-applied
    ...train...
    pruner.finish()                   # the sparsity that was asked for, exactly
    merge_lora(model); pruner.apply() # merging fills zeros of adapted layers, this empties them
    pruner.check()                    # RunError where a pruned weight is not zero

Sparsity after step t of n, quick first, then ever more careful:

    s(t) = s_end + (s_start - s_end) (1 - t / n)^3

The tensors keep their shapes, so the model is no smaller in memory and no faster; only a compressed
file is smaller. structured.py makes a model that really is. Paper: Zhu and Gupta 2017,
arXiv:1710.01878.
"""

import torch
from torch import Tensor, nn

from minilora.errors import RunError, UserError

SCOPES = ("conv", "backbone", "all")
MATRICES = (nn.Conv2d, nn.Linear, nn.Embedding, nn.LSTM)


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """`sparsity` if it is in [0, 1), else UserError."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise UserError(f"{name} is the share of weights that become zero, at least 0 and below 1; got {sparsity!r}")
    return float(sparsity)


def scope_tensors(model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
    """{name in the merged model: weight} of what a scope means: no bias, norm or LoRA matrix.

    conv: kernels of nn.Conv2d. backbone: weight matrices of the picture encoder, without heads.
    all: those of the whole model: convolutions, linear layers, embeddings, LSTMs. UserError where a
    scope matches nothing.
    """
    if scope not in SCOPES:
        raise UserError(f"the pruning scope {scope!r} is not known; the choices are {', '.join(SCOPES)}")
    tower, heads = getattr(model, "vision", model), tuple(getattr(model, "head_modules", ()))
    inside = {id(p) for p in tower.parameters()}
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d if scope == "conv" else MATRICES) or ".lora_" in f".{name}":
            continue
        for key, weight in layer.named_parameters(recurse=False):
            in_backbone = id(weight) in inside and name.partition(".")[0] not in heads
            if "bias" not in key and (in_backbone or scope != "backbone"):
                found[f"{name}.{key}".replace(".base_layer.", ".")] = weight
    if not found:
        kinds = sorted({type(layer).__name__ for layer in model.modules() if isinstance(layer, MATRICES)})
        raise UserError(
            f"the pruning scope {scope!r} matches nothing in {type(model).__name__}, whose weights are in "
            f"{', '.join(kinds) or 'no layer'}; the choices are {', '.join(SCOPES)}"
        )
    return found


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """True where a weight stays: all but the round(sparsity * n) smallest of its n magnitudes. Of
    equal ones the first go, so that the number of zeros is exact and a zero stays a zero."""
    flat = weight.detach().abs().flatten()
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask[flat.argsort(stable=True)[: round(sparsity * flat.numel())]] = False
    return mask.view_as(weight)


def polynomial_sparsity(step: int, steps: int, start: float, end: float) -> float:
    """end + (start - end) (1 - step / steps)^3; `end` from step `steps` on."""
    left = 1 - min(step, steps) / steps if steps > 0 else 0.0
    return end + (start - end) * left**3


class Pruner:
    """Masks for the weights of a scope, kept through optimizer steps, merging and saving.

    sparsity: the share of zeros in every tensor at the end. start: the share at once. steps:
    optimizer steps from start to sparsity; 0 prunes to the end at once. Raises UserError for shares
    outside [0, 1), a start above the end, and a scope that matches nothing.
    """

    def __init__(self, model: nn.Module, scope: str, sparsity: float, start: float | None = None, steps: int = 0):
        self.model, self.scope, self.steps, self.step_number = model, scope, steps, 0
        self.end = check_sparsity(sparsity)
        self.start = check_sparsity(min(0.5, self.end) if start is None else start, "the starting sparsity")
        if self.start > self.end:
            raise UserError(f"pruning begins at {self.start:g} and ends at {self.end:g}: the first must not be larger")
        self.prune_to(polynomial_sparsity(0, steps, self.start, self.end))

    @torch.no_grad()
    def prune_to(self, sparsity: float) -> None:
        """New masks from the magnitudes now; what is zero already stays so."""
        self.sparsity = sparsity
        weights = scope_tensors(self.model, self.scope)
        self.masks = {name: magnitude_mask(weight, sparsity) for name, weight in weights.items()}
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Write the zeros again, for instance after `merge_lora`."""
        for name, weight in self.weights():
            # a product would leave -0.0, which zips worse
            weight.masked_fill_(~self.masks[name], 0.0)

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        """(name, weight) of every pruned tensor as the model holds it now."""
        now = scope_tensors(self.model, self.scope)
        if missing := self.masks.keys() - now.keys():
            raise RunError(f"pruned weights have gone from the model: {', '.join(sorted(missing)[:5])}")
        return [(name, now[name]) for name in self.masks]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Prune after every step of `optimizer`; momentum alone would move masked weights again."""
        optimizer.register_step_post_hook(lambda *_: self.step())

    def step(self) -> None:
        """One optimizer step was taken: follow the schedule, or keep the masks."""
        self.step_number += 1
        if self.step_number <= self.steps:
            self.prune_to(polynomial_sparsity(self.step_number, self.steps, self.start, self.end))
        else:
            self.apply()

    def finish(self) -> None:
        """The sparsity that was asked for, if the schedule did not come to its end."""
        if self.sparsity != self.end:
            self.prune_to(self.end)
        self.apply()
        self.check()

    def check(self) -> dict[str, int]:
        """{name: number of pruned weights}; RunError where one of them is not zero."""
        counts = {}
        for name, weight in self.weights():
            gone = ~self.masks[name]
            if moved := int(torch.count_nonzero(weight.detach()[gone])):
                raise RunError(
                    f"{name}: {moved} pruned weights are no longer zero; call apply() after changing weights"
                )
            counts[name] = int(gone.sum())
        return counts
