"""LoRA, low-rank adaptation: a frozen linear layer with a small trainable detour around it.

                x (..., in)
                |\\
                | \\------------.
                |               |
                |           dropout
                |               |
        W (out, in)        A (r, in)          A starts random, B starts at zero:
          frozen                |             at first the detour adds nothing
                |          B (out, r)
                |               |
                |               * s           s = lora_alpha / r
                |               |
                '------ + ------'
                        |
                y (..., out)

    y = W x + b + s * B A dropout(x)              only A and B are trained

Numbers for one query projection of ViT-base, in = out = 768 and r = 8:
W has 768 * 768 = 589,824 entries, A and B together 8 * (768 + 768) = 12,288, which is 2.1 %.

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al. 2024, arXiv:2402.09353.
A worked example with numbers to follow by hand: `python -m minilora.lessons.equation`.
"""

import math
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora import fused


class InputDropout(nn.Module):
    """Dropout on the input of the low-rank path only, drawn once for all projections that
    read the same x.

    q_proj and v_proj of one attention layer share this module and are called with the same tensor:
    the second finds the first one's result on the tensor, where it lives as long as x does, and
    nothing is kept twice. A layer that reads the same tensor again begins another pass (the next
    step, a checkpoint's recomputation) and draws anew.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, reader: nn.Module) -> Tensor:
        """x (..., in) -> dropout(x), the same tensor for every other `reader` of
        this x in one pass."""
        if not self.training or not self.p:
            return x
        # its dropout points back to it: stored there, a cycle
        own_leaf = x.is_leaf and x.requires_grad
        if torch.compiler.is_compiling() or x.is_inference() or own_leaf:
            return fused.input_dropout(x, self.p)
        state = (id(self), x._version, torch.is_grad_enabled())
        drawn, dropped, readers = getattr(x, "_lora_dropout", (None, x, ()))
        if drawn != state or id(reader) in readers:
            dropped, readers = fused.input_dropout(x, self.p), ()
        x._lora_dropout = (state, dropped, (*readers, id(reader)))
        return dropped

    def extra_repr(self) -> str:
        return f"p={self.p}"


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` plus a trainable low-rank update: y = W x + b + scaling
    * B A dropout(x).

    `lora_A.weight` is (r, in), `lora_B.weight` is (out, r), as in PEFT; both are float32 (float64
    on a float64 base) whatever the precision of the base. `scaling` is lora_alpha / r, or
    lora_alpha / sqrt(r) with use_rslora.

    With use_dora the updated weight V = W + s B A keeps only its direction, and each output
    row gets its own
    trained length m: y = b + (m / |V|) V x, where |V| (out,) is the norm of each row and is held
    constant in backward.

    There is no `.weight` here on purpose: code that reads weights instead of calling layers would
    silently skip LoRA.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
    ):
        super().__init__()
        if r < 1 or not 0.0 <= lora_dropout < 1.0:
            raise ValueError(
                f"LoRALinear needs r >= 1 and 0 <= lora_dropout < 1, got r={r}, lora_dropout={lora_dropout}"
            )
        base = base_layer.weight
        half = base.dtype in (torch.float16, torch.bfloat16)
        kind = {"device": base.device, "dtype": torch.float32 if half else base.dtype}
        self.in_features, self.out_features, self.r = base_layer.in_features, base_layer.out_features, r
        self.lora_alpha = lora_alpha
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.enabled = True  # `disable_lora` switches the low-rank path off
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(self.in_features, r, bias=False, **kind)  # (r, in)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, **kind)  # (out, r)
        self.lora_dropout = InputDropout(lora_dropout)
        self.reset_lora_parameters(init_lora_weights)
        # m (out,)
        self.lora_magnitude_vector = nn.Parameter(self._row_norms()) if use_dora else None
        self.train(base_layer.training)

    def reset_lora_parameters(self, init: bool | str = True) -> None:
        """True: A uniform in +-1/sqrt(in), B zero. "gaussian": A normal with deviation 1/r, B zero.
        False: B random too.

        B = 0 makes the first forward equal to the base layer's, yet dL/dB = s g^T (A x) is not
        zero, so training starts. False is for tests, where a zero B would hide mistakes.
        kaiming_uniform_ with a = sqrt(5) has the bound sqrt(6 / ((1 + 5) * in)) = 1 / sqrt(in), the
        same as nn.Linear's own.
        """
        if init not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights must be True, False or 'gaussian', got {init!r}")
        if init == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(self.lora_B.weight, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if not self.enabled:
            return self.base_layer(x)
        dropped = self.lora_dropout(x, self)
        if self.lora_magnitude_vector is not None:
            return self._dora_forward(x, dropped)
        base = self.base_layer
        return fused.lora_linear(
            x, dropped, base.weight, base.bias, self.lora_A.weight, self.lora_B.weight, self.scaling
        )

    def _dora_forward(self, x: Tensor, dropped: Tensor) -> Tensor:
        """b + (m / |V|) V x, written as the base output plus a correction so that dropout meets
        only the correction."""
        gain = self.lora_magnitude_vector / self._row_norms()  # (out,)
        W, A, B = (layer.weight.to(x.dtype) for layer in (self.base_layer, self.lora_A, self.lora_B))
        base = F.linear(dropped, W)  # without bias: DoRA scales W, not b
        low_rank = F.linear(F.linear(dropped, A), B) * self.scaling
        return self.base_layer(x) + (gain - 1).to(x.dtype) * base + gain.to(x.dtype) * low_rank

    def low_rank_product(self) -> Tensor:
        """s B A, (out, in), in the precision of the adapters, also inside autocast."""
        device = self.lora_A.weight.device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            return self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        product = self.low_rank_product()
        return torch.linalg.vector_norm(self.base_layer.weight.to(product.dtype) + product, dim=1)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """What merging adds to W: s B A, or with DoRA (m / |V|) V - W. Shape (out, in),
        float32 or float64."""
        product = self.low_rank_product()
        if self.lora_magnitude_vector is None:
            return product
        weight = self.base_layer.weight.to(product.dtype)
        return (self.lora_magnitude_vector / self._row_norms())[:, None] * (weight + product) - weight

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain nn.Linear with W + delta_weight() (added in float32, rounded once) and the same
        bias. W is not touched."""
        base, delta = self.base_layer, self.delta_weight()
        plain = nn.Linear(self.in_features, self.out_features, base.bias is not None, device="meta")
        plain.weight = nn.Parameter((base.weight.to(delta.dtype) + delta).to(base.weight.dtype), requires_grad=False)
        if base.bias is not None:
            plain.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
        return plain.train(self.training)

    def __getattr__(self, name: str):
        if name in ("weight", "bias"):
            raise AttributeError(
                f"LoRALinear has no .{name}: something reads the weights of this layer instead of calling it, and LoRA "
                "would have no effect there. Choose other target_modules, or let the model call the layer."
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, scaling={self.scaling:g}"


if __name__ == "__main__":
    sys.exit("the worked example is now: python -m minilora.lessons.equation")
