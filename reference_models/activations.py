"""The functions between the layers of an MLP, by the names that configuration files give them."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), OpenAI CLIP's approximation of GELU; as silu(1.702 x) / 1.702 it keeps
    one tensor for backward, not two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


# by the names that files have; "gelu" is the exact one, with erf
TANH_GELU = dict.fromkeys(
    ("gelu_tanh", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"), partial(nn.GELU, "tanh")
)
EXACT_GELU = {"gelu": nn.GELU, "gelu_python": nn.GELU}
ACTIVATIONS = {**EXACT_GELU, **TANH_GELU, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU}
