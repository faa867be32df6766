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
from torch.nn import functional as F

from minilora import speed
from minilora.speed.gemm import narrow, product


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
    x = x.to(dtype)
    with torch.autocast(device, enabled=False):  # the Function rounds to x's precision itself
        return FusedLoRALinear.apply(x, x if dropped is None else dropped, W, b, A, B, s)


class FusedLoRALinear(torch.autograd.Function):
    """Scale and add happen inside the matrix product (`addmm_`), and nothing is kept twice.

    Of the activations x' is kept for backward, since a frozen W needs no x, and in half precision
    and on a GPU also h (N, r); else that is computed again. Where `merging_pays`, W' = W + s B A
    takes W's place and both additions fall away: y = x W'^T + b, dL/dx = g W'.
    """

    @staticmethod
    def forward(ctx, x, dropped, W, b, A, B, s):
        rows = dropped.reshape(-1, dropped.shape[-1])  # x' (N, in)
        given = W, A, B
        W, b, A, B = (tensor if tensor is None else tensor.to(x.dtype) for tensor in (W, b, A, B))
        ctx.s, ctx.no_dropout, ctx.shape = s, dropped is x, x.shape
        ctx.merged = ctx.no_dropout and merging_pays(rows, W)
        h = None
        if ctx.merged:
            y = product(rows, torch.addmm(W, B, A, alpha=s), b)
        else:
            y = product(x.reshape(rows.shape), W, b)  # (N, out)
            h = narrow(rows, A)  # (N, r)
            y.addmm_(h, B.T, alpha=s)  # y = y + s h B^T, in place
        ctx.save_for_backward(dropped, *given, h if x.is_cuda or x.dtype.itemsize == 2 else None)
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx, grad):
        dropped, W, A, B, h = ctx.saved_tensors
        W, A, B = (tensor.to(dropped.dtype) for tensor in (W, A, B))
        need_x, need_dropped, _, need_b, need_A, need_B, _ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])  # (N, out)
        rows = dropped.reshape(-1, dropped.shape[-1])  # x' (N, in)
        # `product` and `narrow` record no graph; somebody who wants second derivatives
        # (create_graph=True, as in a gradient penalty) needs one of the backward pass too
        graph = torch.is_grad_enabled()
        times, few = (F.linear, F.linear) if graph else (product, narrow)
        s_gB = few(g, B.T).mul_(ctx.s)  # s gB (N, r)
        dx = d_dropped = None
        if need_x:
            dx = times(g, (torch.addmm(W, B, A, alpha=ctx.s) if ctx.merged else W).T)  # (N, in)
            if ctx.no_dropout and not ctx.merged:
                dx.addmm_(s_gB, A)  # dx = g W + s gB A, in place
            dx = dx.view(ctx.shape)
        if need_dropped and not ctx.no_dropout:
            d_dropped = times(s_gB, A.T).view(ctx.shape)
        dA = times(s_gB.T, rows.T) if need_A else None  # (r, in)
        if need_B:
            h = few(rows, A) if h is None or graph else h
            # g^T h, (out, r), as (h^T g)^T: the wide matrix on the right is four times faster
            dB = times(h.T, g.T).T.mul_(ctx.s)
        return dx, d_dropped, None, g.sum(0) if need_b else None, dA, dB if need_B else None, None


def merging_pays(x: Tensor, W: Tensor) -> bool:
    """Whether W' = W + s B A, made in forward and again in backward, costs less than what it saves,
    for x (N, in) and W (out, in) on a CPU, where products with r columns are bound by memory.

    W is read and W' written twice, 4 in out numbers. Saved are x read for h, y read and written to
    add s h B^T, and dL/dx to add s gB A, N (2 out + 3 in) numbers. Measured by
    tests/benchmarks/products.py.

    Never in half precision: what training adds to an entry of W is mostly smaller than 1/512 of it,
    half the last place in bfloat16, and would round away. In float32 that is 1/16,000,000.
    """
    n_out, n_in = W.shape
    worth = len(x) * (2 * n_out + 3 * n_in) >= 4 * n_in * n_out
    return worth and x.device.type == "cpu" and x.dtype.itemsize > 2
