"""The same sum as `LoRALinear.forward` in fewer passes over memory, with its gradients by hand.

    y = x W^T + b + s h B^T,   h = x' A^T          x' = dropout(x), or x itself

    x, x' (N, in)    W (out, in)    b (out,)    A (r, in)    B (out, r)    h (N, r)    y, g (N, out)

N is the number of rows, the product of all dimensions before the last. For small changes dx, dA, dB
the loss L changes by the sum of g = dL/dy times dy, entry by entry: dL = <g, dy>. In such a sum a
factor may change sides, <P, Q R> = <P R^T, Q> = <Q^T P, R>, and what then stands beside dB is the
gradient dL/dB. W is frozen (Hu et al. 2021, section 4.1), so with dh = dx' A^T + x' dA^T

    dL = <g, dx W^T> + s <g, h dB^T> + s <g, dh B^T>      that is, term by term:
      <g, dx W^T>   = <g W, dx>               dL/dx  = g W
    s <g, h dB^T>   = s <g^T h, dB>           dL/dB  = s g^T h
    s <g, dh B^T>   = s <gB, dh>              gB = g B  (N, r)
    s <gB, x' dA^T> = s <gB^T x', dA>         dL/dA  = s gB^T x'
    s <gB, dx' A^T> = s <gB A, dx'>           dL/dx' = s gB A, added to dL/dx where x' is x

In the code dx, dA, dB are these gradients, as in `python -m minilora.lessons.equation`, which shows
the numbers of one step.
"""

import torch
from torch import Tensor

from minilora import speed
from minilora.speed.gemm import product


def applies(x: Tensor, W: Tensor) -> bool:
    """Whether `lora_linear` may take the place of the readable form.

    Not where W is trained (there is no dW above), not on the meta device (autocast does not know
    it), and not under torch.compile, which fuses the readable form by itself.
    """
    return speed.enabled and not (W.requires_grad or x.is_meta or torch.compiler.is_compiling())


def lora_linear(x: Tensor, dropped: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    """y = x W^T + b + s (dropped A^T) B^T, in autocast's precision where autocast is on.

    Shapes: x and dropped (..., in), the others as above; returns (..., out). Pass x itself as
    `dropped` where there is no dropout: then one tensor is kept for backward, not two.
    """
    device = x.device.type
    # autocast leaves float64 alone
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    dropped = None if dropped is x else dropped.to(dtype)
    x, W, b, A, B = (tensor if tensor is None else tensor.to(dtype) for tensor in (x, W, b, A, B))
    with torch.autocast(device, enabled=False):  # every operand already has its precision
        return FusedLoRALinear.apply(x, x if dropped is None else dropped, W, b, A, B, s)


class FusedLoRALinear(torch.autograd.Function):
    """Scale and add happen inside the matrix product (`addmm_`), and nothing is kept twice.

    Of the activations only x' is kept for backward: a frozen W needs no x, and h (N, r) is cheaper
    to compute again than to keep.
    """

    @staticmethod
    def forward(ctx, x, dropped, W, b, A, B, s):
        rows = dropped.reshape(-1, dropped.shape[-1])  # x' (N, in)
        y = product(x.reshape(rows.shape), W, b)  # (N, out)
        h = product(rows, A)  # (N, r)
        y.addmm_(h, B.T, alpha=s)  # y = y + s h B^T, in place
        ctx.save_for_backward(dropped, W, A, B)
        ctx.s, ctx.no_dropout, ctx.shape = s, dropped is x, x.shape
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx, grad):
        dropped, W, A, B = ctx.saved_tensors
        need_x, need_dropped, _, need_b, need_A, need_B, _ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])  # (N, out)
        rows = dropped.reshape(-1, dropped.shape[-1])  # x' (N, in)
        # `product` records no graph; somebody who wants second derivatives (create_graph=True, as
        # in a gradient penalty) needs one of the backward pass too
        multiply = torch.matmul if torch.is_grad_enabled() else _multiply
        s_gB = multiply(g, B).mul_(ctx.s)  # s gB (N, r)
        dx = d_dropped = None
        if need_x:
            dx = multiply(g, W)  # (N, in)
            if ctx.no_dropout:
                dx.addmm_(s_gB, A)  # dx = g W + s gB A, in place
            dx = dx.view(ctx.shape)
        if need_dropped and not ctx.no_dropout:
            d_dropped = multiply(s_gB, A).view(ctx.shape)
        dA = s_gB.T @ rows if need_A else None  # (r, in)
        # g^T h, (out, r), as (h^T g)^T: the wide matrix on the right is four times faster on a CPU
        dB = (multiply(rows, A.T).T @ g).T.mul_(ctx.s) if need_B else None
        return dx, d_dropped, None, g.sum(0) if need_b else None, dA, dB, None


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """left @ right by the fastest product."""
    return product(left, right.T)
