"""LoRA, low-rank adaptation: a frozen linear layer with a small trainable detour around it.

                x (..., in)
                +---------------.
                |           dropout
                |               |
        W (out, in)        A (r, in)          A starts random, B starts at zero:
          frozen                |             at first the detour adds nothing
                |          B (out, r)
                |               * s           s = lora_alpha / r
                |               |
                '------ + ------'
                        |
                y (..., out)                  the sum of both ways

    y = W x + b + s * B A dropout(x)              only A and B are trained

Why so few numbers are enough: what fine-tuning changes in W has a low rank in effect (Aghajanyan
et al. 2020, arXiv:2012.13255; Hu et al. 2021, section 7), and B A is any matrix of rank up to r.
With in = out = 768 (a query projection of ViT-base) and r = 8, W has 768 * 768 = 589,824 entries,
A and B together 8 * (768 + 768) = 12,288, which is 2.1 %.

Paper: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
A worked example with numbers to follow by hand: `python -m minilora.lessons.equation`.
"""

import math
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora import fused
from minilora.speed.dropout import InputDropout


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` plus a trainable low-rank update: y = W x + b + s B A dropout(x).

    `lora_A.weight` is (r, in), `lora_B.weight` is (out, r), as in PEFT; both are float32 (float64
    on a float64 base) whatever the precision of the base. `scaling` is s: lora_alpha / r, or
    lora_alpha / sqrt(r) with use_rslora.
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
        if use_dora:
            raise ValueError("use_dora: DoRA is a layer of its own, minilora.DoRALinear(base_layer, r, lora_alpha)")
        if r < 1 or not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"LoRALinear needs r >= 1 and 0 <= lora_dropout < 1, got {r=}, {lora_dropout=}")
        W = base_layer.weight
        dtype = torch.float32 if W.dtype in (torch.float16, torch.bfloat16) else W.dtype
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r, self.lora_alpha = r, lora_alpha
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.enabled = True  # `disable_lora` switches the low-rank path off
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(self.in_features, r, bias=False, device=W.device, dtype=dtype)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, device=W.device, dtype=dtype)
        self.lora_dropout = InputDropout(lora_dropout)
        self.reset_lora_parameters(init_lora_weights)
        self.train(base_layer.training)

    def reset_lora_parameters(self, init: bool | str = True) -> None:
        """Draw A and B anew:

        init          A (r, in)                       B (out, r)
        True          uniform in +-1 / sqrt(in)       zero
        "gaussian"    normal, deviation 1 / r         zero
        False         uniform in +-1 / sqrt(in)       uniform in +-1 / sqrt(r)

        B = 0 makes the first forward equal to the base layer's, yet dL/dB = s g^T (A x) is not
        zero, so training starts. False is for tests, where a zero B would hide mistakes. The bound
        of kaiming_uniform_ with a = sqrt(5) is sqrt(6 / ((1 + 5) * in)) = 1 / sqrt(in).
        """
        if init not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights must be True, False or 'gaussian', got {init!r}")
        if init == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if init is False:
            nn.init.kaiming_uniform_(self.lora_B.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, d: Tensor | None = None) -> Tensor:
        """x (..., in) -> (..., out). d: dropout(x), where a subclass has drawn it already."""
        if not self.enabled:
            return self.base_layer(x)
        W, b, A, B = self.base_layer.weight, self.base_layer.bias, self.lora_A.weight, self.lora_B.weight
        d = self.lora_dropout(x, self) if d is None else d
        if fused.applies(x, W):  # the same sum in fewer passes over memory
            return fused.lora_linear(x, d, W, b, A, B, self.scaling)
        h = F.linear(d, A.to(d.dtype))  # (..., in) -> (..., r)
        return self.base_layer(x) + self.scaling * F.linear(h, B.to(d.dtype))

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """What merging adds to W: s B A (out, in), float32 or float64, also inside autocast."""
        device = self.lora_A.weight.device.type
        # autocast knows no meta device; any name will do there, since nothing is computed
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            return self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain nn.Linear with W + delta_weight(), rounded once, and the same bias; W stays W."""
        W, b, delta = self.base_layer.weight, self.base_layer.bias, self.delta_weight()
        # meta: no memory, no numbers drawn, since both tensors are replaced
        plain = nn.Linear(self.in_features, self.out_features, b is not None, device="meta")
        plain.weight = nn.Parameter((W.to(delta.dtype) + delta).to(W.dtype), requires_grad=False)
        plain.bias = None if b is None else nn.Parameter(b.detach().clone(), requires_grad=False)
        return plain.train(self.training)

    def __getattr__(self, name: str):
        # asked only for what normal lookup does not find: parameters, modules, what is not there
        if name in ("weight", "bias"):
            raise AttributeError(
                f"LoRALinear has no .{name}: something reads the weights of this layer instead of calling it, and LoRA "
                "would have no effect there. Choose other target_modules, or let the model call the layer."
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, scaling={self.scaling:g}"


if __name__ == "__main__":
    print("error: the worked example is now: python -m minilora.lessons.equation", file=sys.stderr)
    sys.exit(2)
