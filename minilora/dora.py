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

        With d = dropout(x) and gain = m / |V|:  y = (W x + b + s B A d) + (gain - 1) V d

        The first part is LoRA's y, and without dropout V d is y without b: one product by W is
        enough. gain - 1 is small, and half precision keeps more of it than of gain.
        """
        if not self.enabled:
            return self.base_layer(x)
        d, b = self.lora_dropout(x, self), self.base_layer.bias
        gain = self.lora_magnitude_vector / self._row_norms()  # (out,)
        y = super().forward(x, d)
        Vd = y if d is x else super().forward(d, d)
        Vd = Vd if b is None else Vd - b.to(y.dtype)  # DoRA scales W, not b
        return torch.addcmul(y, Vd, (gain - 1).to(y.dtype))

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
