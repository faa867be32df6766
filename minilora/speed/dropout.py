"""Dropout on the input of the low-rank path: one mask for several layers, cheaply drawn and kept.

q_proj and v_proj of one attention layer read the same x. With one mask for both, there is one draw
instead of two and one dropped x to keep for backward. Each layer alone still sees plain dropout.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora import speed


class InputDropout(nn.Module):
    """Dropout that is drawn once for all layers that share this module and read the same tensor x.

    The first layer's result is stored on x itself, as an attribute, and lives as long as x does;
    the second layer finds it there. A layer that comes back with the same x begins another pass
    (the next step, or a checkpoint's recomputation), for which a new mask is drawn.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        """x (..., in) -> dropout(x), the same tensor for every other `layer` in one pass."""
        if not self.training or not self.p:
            return x
        if not speed.enabled or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        # dropout(x) of a leaf with gradient points back to x: stored on x, it would be a cycle
        would_be_a_cycle = x.is_leaf and x.requires_grad
        if would_be_a_cycle or x.is_inference():
            return input_dropout(x, self.p)
        # x changed in place, or read with gradients after a pass without, is another input
        this_input = (id(self), x._version, torch.is_grad_enabled())
        stored_input, dropped, seen_layers = getattr(x, "_lora_dropout", (None, x, ()))
        if stored_input != this_input or id(layer) in seen_layers:
            dropped, seen_layers = input_dropout(x, self.p), ()
        x._lora_dropout = (this_input, dropped, (*seen_layers, id(layer)))
        return dropped

    def extra_repr(self) -> str:
        return f"p={self.p}"


def input_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout with probability p: entries become 0, the others x / (1 - p).

    On a CPU torch draws its masks one number per entry, which costs more than the projection
    itself; there the mask is made of 16-bit numbers, and p is rounded to a multiple of 1 / 65536.
    """
    return _MaskedScale.apply(x, p) if x.device.type == "cpu" else F.dropout(x, p)


class _MaskedScale(torch.autograd.Function):
    """y = x * mask * scale, backward dx = g * mask * scale, the mask kept as one bit per entry."""

    @staticmethod
    def forward(ctx, x, p):
        dropped_of_65536 = min(round(p * 65536), 65535)
        # the scale follows the rounded p, so that the mean of y is exactly that of x
        ctx.scale = 65536 / (65536 - dropped_of_65536)
        # one 64-bit draw holds four 16-bit numbers; the upper end None means "all 64 bits",
        # since the number that it stands for, 2^63, is one more than an int64 can hold
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        numbers = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in [-32768, 32767]
        mask = numbers >= dropped_of_65536 - 32768
        # eight entries to a byte by numpy, on the same memory: torch has no packbits
        ctx.save_for_backward(torch.from_numpy(np.packbits(mask.view(torch.uint8).numpy())))
        # the mask becomes numbers first: x * mask would mix types, five times slower
        return mask.to(x.dtype).mul_(ctx.scale).mul_(x)

    @staticmethod
    def backward(ctx, grad):
        (bits,) = ctx.saved_tensors
        mask = torch.from_numpy(np.unpackbits(bits.numpy(), count=grad.numel())).view(grad.shape)
        return mask.to(grad.dtype).mul_(ctx.scale).mul_(grad), None
