"""The arithmetic of one LoRA projection: a readable form and a fused form of the same equation.

    y = x W^T + b + s * (x' A^T) B^T          x' = dropout(x), or x itself

    x  (..., in)    W (out, in)    b (out,)    A (r, in)    B (out, r)    s = lora_alpha / r    y (..., out)

W is frozen (Hu et al. 2021, arXiv:2106.09685, section 4.1), so a training step needs only these
gradients, with g = dL/dy and h = x' A^T:

    dB = s * g^T h        dA = s * (g B)^T x'        dx = g W + s * (g B) A

`lora_linear` is what every LoRALinear calls. `fused.enabled` is the one switch
between the two forms.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minilora.speed.gemm import product

# False: always the readable form. torch.compile also takes that one and fuses it by itself.
enabled = True


def lora_linear(x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float):
    """y = x W^T + b + scaling * (dropped A^T) B^T, computed in autocast's precision
    where autocast is on.

    Shapes: x and dropped (..., in), weight (out, in), bias (out,) or None, A (r, in), B (out, r);
    returns (..., out). Pass x itself as `dropped` where there is no dropout: the fused form then
    saves one tensor, not two.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    same = dropped is x
    x = x.to(dtype)
    dropped = x if same else dropped.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    arguments = (x, dropped, weight.to(dtype), bias, A.to(dtype), B.to(dtype), scaling)
    if not enabled or weight.requires_grad or torch.compiler.is_compiling():
        return plain_lora_linear(*arguments)
    with torch.autocast(device, enabled=False):  # every operand already has its precision
        return FusedLoRALinear.apply(*arguments)


def plain_lora_linear(x, dropped, weight, bias, A, B, scaling):
    """The readable form: three lines, differentiated by autograd."""
    base = F.linear(x, weight, bias)  # (..., out)
    low_rank = F.linear(F.linear(dropped, A), B)  # (..., in) -> (..., r) -> (..., out)
    return base + scaling * low_rank


class FusedLoRALinear(torch.autograd.Function):
    """The same value and gradients with fewer passes over memory and nothing saved twice.

    Scale and add happen inside the matrix product (`addmm_`). Of the activations
    only x' is kept for
    backward: a frozen W needs no x, and h = x' A^T (N, r) is cheaper to compute again than to keep.
    N is the number of rows, the product of the dimensions `...`.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, A, B, scaling):
        rows = dropped.reshape(-1, dropped.shape[-1])  # (N, in)
        y = product(x.reshape(rows.shape), weight, bias)  # (N, out)
        h = product(rows, A)  # (N, r)
        y.addmm_(h, B.T, alpha=scaling)  # y = y + s * h B^T, in place
        ctx.save_for_backward(dropped, weight, A, B)
        ctx.scaling, ctx.shared, ctx.shape = scaling, dropped is x, x.shape
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad):
        dropped, weight, A, B = ctx.saved_tensors
        need_x, need_dropped, _, need_bias, need_A, need_B, _ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])  # (N, out)
        rows = dropped.reshape(-1, dropped.shape[-1])  # (N, in)
        # create_graph=True wants a graph of the backward pass itself
        multiply = torch.matmul if torch.is_grad_enabled() else multiply_fast
        gB = multiply(g, B).mul_(ctx.scaling)  # (N, r)
        dx = d_dropped = None
        if need_x:
            dx = multiply(g, weight)  # (N, in)
            if ctx.shared:
                dx.addmm_(gB, A)  # dx = g W + s * (g B) A, in place
            dx = dx.view(ctx.shape)
        if need_dropped and not ctx.shared:
            d_dropped = multiply(gB, A).view(ctx.shape)
        dA = gB.T @ rows if need_A else None  # (r, in)
        # g^T h, (out, r), as (h^T g)^T: the wide matrix on the right is four times faster on a CPU
        dB = (multiply(rows, A.T).T @ g).T.mul_(ctx.scaling) if need_B else None
        return dx, d_dropped, None, g.sum(0) if need_bias else None, dA, dB, None


def multiply_fast(g: Tensor, weight: Tensor) -> Tensor:
    """g W for g (N, out), W (out, in)."""
    return product(g, weight.T)


def input_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout with probability p: entries become 0, the others x / (1 - p).

    On a CPU torch draws its masks one number per entry, which costs more than the projection
    itself. One 64-bit draw holds four 16-bit numbers, so the mask is made from those; p is rounded
    to a multiple of 1 / 65536 and the scale follows the rounded p, so the mean stays exact. The
    mask is kept for backward as one bit per entry.
    """
    if not enabled or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return _MaskedScale.apply(x, p)


class _MaskedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        dropped_of_65536 = min(round(p * 65536), 65535)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        numbers = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in [-32768, 32767]
        mask = numbers >= dropped_of_65536 - 32768
        ctx.save_for_backward(torch.from_numpy(np.packbits(mask.view(torch.uint8).numpy())))
        ctx.scale = 65536 / (65536 - dropped_of_65536)
        # x * mask would mix types, five times slower
        return mask.to(x.dtype).mul_(ctx.scale).mul_(x)

    @staticmethod
    def backward(ctx, grad):
        (bits,) = ctx.saved_tensors
        mask = torch.from_numpy(np.unpackbits(bits.numpy(), count=grad.numel())).view(grad.shape)
        return mask.to(grad.dtype).mul_(ctx.scale).mul_(grad), None
