"""What changes the weights: parameter groups, optimizer, learning-rate schedule, gradient norm.

The learning rate of optimizer step s is `group lr * factor(s)`. For linear, cosine and constant the
factor is a closed-form function of s, so nothing about it has to be stored; plateau alone has a
memory (class Plateau).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from minilora.errors import UserError

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": partial(torch.optim.SGD, momentum=0.9)}
# what is left of the rate when a share `done` of the steps after the warm-up is taken
SCHEDULES = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
    "plateau": lambda done: 1.0,  # times Plateau.factor
}
FUSED_DEVICES = ("cpu", "cuda")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer moves, by name; at least one, all float32: a float16 one
    loses updates smaller than 1/2048 of itself, and GradScaler does not unscale its gradient."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise UserError("nothing to train: no parameter of the model has requires_grad=True; call inject_lora first")
    for name, parameter in trainable.items():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"trainable parameter {name} is {parameter.dtype}; trainable tensors must be float32 "
                "(--base-dtype is for the frozen ones)"
            )
    return trainable


def parameter_groups(
    model: nn.Module, lr: float, head_lr: float | None, weight_decay: float, lora_plus: float = 1
) -> list[dict]:
    """Matrices decay, vectors (biases, norms) do not; the head may have its own rate, and every
    lora_B has `lora_plus` times that of lora_A (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""
    heads = tuple(f"{name}." for name in getattr(model, "head_modules", ()))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable_parameters(model).items():
        is_head = bool(heads) and name.startswith(heads)
        rate = lr if head_lr is None or not is_head else head_lr
        rate *= lora_plus if name.endswith("lora_B.weight") else 1.0
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def build_optimizer(
    model: nn.Module, opt: str, lr: float, head_lr: float | None = None, weight_decay: float = 0, lora_plus: float = 1
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), Adam (Kingma & Ba 2015) or SGD with momentum .9, by name.

    Fused kernels for the first two: SGD's leaves its momentum uninitialised where GradScaler passes
    over the first step, and the next step reads it.
    """
    if opt not in OPTIMIZERS:
        raise UserError(f"--opt {opt} is unknown; choose one of {', '.join(OPTIMIZERS)}")
    groups = parameter_groups(model, lr, head_lr, weight_decay, lora_plus)
    fused = opt != "sgd" and groups[0]["params"][0].device.type in FUSED_DEVICES
    return OPTIMIZERS[opt](groups, fused=fused or None)  # None: torch chooses, foreach on a GPU


def schedule_factor(sched: str, step: int, total: int, warmup: int) -> float:
    """Factor of the learning rate at step 0 .. total-1, after a linear warm-up of `warmup` steps.

    warm-up (s + 1) / w     linear (t - s) / (t - w)     cosine (1 + cos(pi (s - w) / (t - w))) / 2
    """
    if sched not in SCHEDULES:
        raise UserError(f"--sched {sched} is unknown; choose one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[sched](min(1.0, (step - warmup) / max(1, total - warmup)))


@dataclass
class Plateau:
    """Halves the rate after more than `patience` epochs without a loss .01 % below the best."""

    factor: float = 1.0
    best: float | None = None
    bad_epochs: int = 0
    patience: int = 2

    def update(self, loss: float) -> None:
        """After an epoch, with its validation loss; one that is not finite counts as not better."""
        if math.isfinite(loss) and (self.best is None or loss < self.best * (1.0 - 1e-4)):
            self.best, self.bad_epochs = loss, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs > self.patience:
            self.factor, self.bad_epochs = self.factor * 0.5, 0


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Gives every group its base rate times `factor`; returns the first group's rate, to log."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm over all gradients, () on their device, which also says whether all are finite."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scales all gradients by max_norm / norm where a finite norm is larger; 0 = never."""
    if 0 < max_norm < norm < math.inf:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], max_norm / norm)
