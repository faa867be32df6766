"""Matrix products on a CPU by the library, and in the form, that is fast: fixed rules.

torch sends float32 products to MKL, which asks for the vendor before it asks for instructions: on
an AMD processor with AVX-512 it takes its AVX2 kernels, at half the speed of oneDNN's (105 beside
215 GFLOP/s). Both are in every torch wheel and compute the same sums in another order. So it is the
vendor that decides here as well, then the size; nothing is timed in a run, and a machine always
gives the same bits. Measured by tests/benchmarks/products.py.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora import speed
from minilora.speed.threads import text_of

# multiplications; up to here the call itself costs more than oneDNN gains
SMALLEST = 2**20


available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
onednn = available and "AuthenticAMD" in text_of(Path("/proc/cpuinfo"))


def _for_onednn(x: Tensor) -> bool:
    return speed.enabled and onednn and x.dtype == torch.float32 and x.device.type == "cpu"


def _large(x: Tensor, weight: Tensor) -> bool:
    return len(x) * weight.numel() > SMALLEST


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (N, out), for x (N, in), W (out, in), b (out,): no graph is recorded."""
    if _for_onednn(x) and _large(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def narrow(x: Tensor, A: Tensor) -> Tensor:
    """x A^T, (N, r), for x (N, in) and few rows in A (r, in): no graph is recorded. Other libraries
    than oneDNN are up to four times faster with the long side across: the view (A x^T)^T."""
    if x.device.type != "cpu" or (_for_onednn(x) and _large(x, A)):
        return product(x, A)
    return (A @ x.T).T


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
            rows = x.reshape(-1, x.shape[-1])
            dW = g.T @ rows if torch.is_grad_enabled() else product(g.T, rows.T)
        return dx, dW, g.sum(0) if need_bias else None


def speed_up(model: nn.Module) -> nn.Module:
    """Turn every plain nn.Linear of `model` (those inside LoRALinear are its own affair) into a
    FastLinear, in place; names, parameters and values stay."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.endswith((".base_layer", ".lora_A", ".lora_B")):
            module.__class__ = FastLinear
    return model
