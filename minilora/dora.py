"""DoRA: the updated weight keeps its direction alone, and each output row learns its length apart.

    V = W + s B A                    (out, in), a LoRA update as in lora.py
    y = b + (m / |V|) V dropout(x)   |V| (out,) is the length of each row, m (out,) the trained one

m starts as |V|, so that at first nothing changes. Fine-tuning moves lengths and directions of the
rows rather independently; LoRA alone moves them in step (section 3 of the paper). |V| is held
constant in backward (section 4.3): its gradient would cost memory and bring nothing.

Paper: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.lora import LoRALinear


class DoRALinear(LoRALinear):
    """A LoRALinear whose updated rows have trained lengths: y = b + (m / |V|) V x, V = W + s B A.

    `lora_magnitude_vector` is m (out,), as in PEFT, float32 or float64 like A and B.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ):
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights=init_lora_weights)
        self.lora_magnitude_vector = nn.Parameter(self._row_norms())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out): the base output plus a correction, which alone meets dropout.

        With d = dropout(x) and gain = m / |V|:  y = W x + b + (gain - 1) W d + gain s B A d
        """
        if not self.enabled:
            return self.base_layer(x)
        d = self.lora_dropout(x, self)
        gain = self.lora_magnitude_vector / self._row_norms()  # (out,)
        W, A, B = (layer.weight.to(x.dtype) for layer in (self.base_layer, self.lora_A, self.lora_B))
        base = F.linear(d, W)  # without bias: DoRA scales W, not b
        low_rank = F.linear(F.linear(d, A), B) * self.scaling
        return self.base_layer(x) + (gain - 1).to(x.dtype) * base + gain.to(x.dtype) * low_rank

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """What merging adds to W: (m / |V|) V - W. Shape (out, in), float32 or float64."""
        low_rank = super().delta_weight()
        W = self.base_layer.weight.to(low_rank.dtype)
        return (self.lora_magnitude_vector / self._row_norms())[:, None] * (W + low_rank) - W

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """|V| (out,)."""
        low_rank = super().delta_weight()
        return torch.linalg.vector_norm(self.base_layer.weight.to(low_rank.dtype) + low_rank, dim=1)
