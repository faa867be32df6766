"""float32 matrix products on a CPU by oneDNN where it is the faster library.

torch sends float32 products to MKL, which on AMD processors runs 10 to 20 % below oneDNN; both are
in every torch wheel and compute the same sums in another order. `onednn` is the switch: by default
it is on where /proc/cpuinfo says AMD, so that a machine always gives the same bits. Measured in
tests/benchmarks/README.md.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora import speed

FEWEST_ROWS = 256  # below this the call itself costs more than oneDNN gains


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
onednn = available and _is_amd()


def _for_onednn(x: Tensor) -> bool:
    return speed.enabled and onednn and x.dtype == torch.float32 and x.device.type == "cpu"


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (N, in), W (out, in), also a transposed view, b (out,): no graph is recorded.
    Returns (N, out)."""
    if _for_onednn(x) and len(x) >= FEWEST_ROWS:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class FastLinear(nn.Linear):
    """An nn.Linear that multiplies by `product`; `speed_up` turns existing layers into it."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
        if plain or not _for_onednn(x):
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """y = x W^T + b; dx = g W, dW = g^T x, db = sum of g. x is kept only where W is trained."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        y = product(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])  # (N, out)
        dx = dW = None
        # with create_graph=True by the plain product, which autograd can differentiate again
        if need_x:
            dx = g @ weight if torch.is_grad_enabled() else product(g, weight.T)
            dx = dx.view(*grad.shape[:-1], weight.shape[1])
        if need_weight:
            dW = g.T @ x.reshape(-1, x.shape[-1])
        return dx, dW, g.sum(0) if need_bias else None


def speed_up(model: nn.Module) -> nn.Module:
    """Turn every plain nn.Linear of `model` (those inside LoRALinear are its own affair) into a
    FastLinear, in place.

    Names, parameters and values stay; `slow_down` turns them back.
    """
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.endswith((".base_layer", ".lora_A", ".lora_B")):
            module.__class__ = FastLinear
    return model


def slow_down(model: nn.Module) -> nn.Module:
    """Undo `speed_up`."""
    for module in model.modules():
        if type(module) is FastLinear:
            module.__class__ = nn.Linear
    return model
