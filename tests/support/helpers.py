"""Helpers for the tests of the LoRA core: the dense equivalent, one comparison for value and gradient, tiny models."""

import copy
import warnings

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from minilora import DoRALinear, LoRAConfig, LoRALinear, inject_lora, speed
from minilora.inject import lora_layers
from reference_models import create_model

# float32: each of two sides sums at most 9 + 9 + 9 products (`layer_cases`), and a sum of n rounds by at most n 2^-24
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2 * 27 * 2**-24, torch.bfloat16: 4e-2, torch.float16: 5e-3}


class readable_form:
    """Within the `with` block every LoRALinear computes the readable form instead of the fused one."""

    def __enter__(self):
        speed.enabled = False

    def __exit__(self, *_):
        speed.enabled = True


def lora_linear(d_in=6, d_out=4, r=2, alpha=3.0, bias=True, dtype=torch.float64, **options) -> LoRALinear:
    """A LoRALinear whose A and B are non-zero, so that no mistake hides behind B = 0."""
    return LoRALinear(nn.Linear(d_in, d_out, bias=bias, dtype=dtype), r, alpha, init_lora_weights=False, **options)


def dora_linear(d_in=6, d_out=4, r=2, alpha=3.0, bias=True, dtype=torch.float64, **options) -> DoRALinear:
    """A DoRALinear whose A and B are non-zero, and whose lengths m are not those of the rows."""
    layer = DoRALinear(nn.Linear(d_in, d_out, bias=bias, dtype=dtype), r, alpha, init_lora_weights=False, **options)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(torch.rand_like(layer.lora_magnitude_vector) + 0.5)
    return layer


def dense_forward(layer: LoRALinear, x: Tensor) -> Tensor:
    """The definition: one dense weight W + s B A, written with matmul alone."""
    W, b = layer.base_layer.weight, layer.base_layer.bias
    return x @ (W + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight).T + (0 if b is None else b)


def value_and_gradients(function, x: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """{"y": value, "x": dL/dx, name: dL/dparameter} for a loss that weighs every output differently."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    n = y.numel()
    weights = torch.linspace(-1, 1, max(n, 1), dtype=torch.float64, device=x.device)[:n]
    loss = (y.double() * weights.view(y.shape)).sum()
    inputs = {"x": x, **{name: p for name, p in parameters.items() if p.requires_grad}}
    return {"y": y.detach()} | dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


def assert_equal_value_and_gradients(ours, wanted, x: Tensor, layer: nn.Module, tolerance: float | None = None):
    """Both functions of x give the same value and the same gradients of x and of every trainable parameter.

    Differences are counted in units of the largest number in the comparison, or of 1 where all are smaller.
    """
    parameters = dict(layer.named_parameters())
    a, b = (value_and_gradients(function, x, parameters) for function in (ours, wanted))
    scale = max([1.0, *(tensor.abs().max().item() for tensor in b.values() if tensor.numel())])
    for name in b:
        assert a[name].shape == b[name].shape, name
        if b[name].numel():
            error = (a[name].double() - b[name].double()).abs().max().item() / scale
            assert error <= (tolerance or TOLERANCE[x.dtype]), f"{name} differs by {error:.2e}"


def tiny_vit(num_classes: int = 10, depth: int = 2, **overrides) -> nn.Module:
    """A ViT with 32-pixel pictures and every tensor random, norms and biases included."""
    sizes = {"image_size": 32, "dim": 24, "heads": 3, "hidden": 48, "depth": depth} | overrides
    return randomise(create_model("vit-tiny-patch16-224", num_classes, **sizes))


def randomise(model: nn.Module, scale: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=scale)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


def randomise_trained(model: nn.Module) -> nn.Module:
    """Random values in everything that is trained, as after many steps."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.05 if "magnitude" in name else 0.2))
    return model


def train_steps(model: nn.Module, forward, steps: int = 2, lr: float = 0.05) -> list[float]:
    """AdamW on everything that requires a gradient; `forward(model)` gives logits with labels 0, 1, 2, ..."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        logits = forward(model)
        loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return copy.deepcopy(dict(model.state_dict()))


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def adapted(model: nn.Module) -> list[str]:
    return [name for name, _ in lora_layers(model)]


def logits_of(model: nn.Module, *inputs, **named) -> Tensor:
    """The logits of a model of any library, without gradient."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(*inputs, **named)
    return getattr(out, "logits", out)


class TwoReaders(nn.Module):
    """q and v read the same h = relu(x), out reads another tensor: an attention layer in small."""

    def __init__(self):
        super().__init__()
        self.q, self.v, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        h = F.relu(x)
        return self.out(self.q(h) + self.v(h))


def two_readers(p: float = 0.5) -> nn.Module:
    config = LoRAConfig(r=4, lora_dropout=p, target_modules=("q", "v", "out"), init_lora_weights=False)
    return inject_lora(TwoReaders(), config)


SHAPES = {"(in)": (), "(B, in)": (3,), "(B, T, in)": (2, 5), "(B, H, T, in)": (2, 1, 3), "empty batch": (0,)}


@st.composite
def layer_cases(draw):
    """Any shape, any rank from 1 to min(in, out), with and without bias, rsLoRA."""
    d_in, d_out = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    r = draw(st.integers(1, min(d_in, d_out)))
    alpha = draw(st.sampled_from([0.5, 1.0, 3.0, 2.0 * r]))
    choices = {name: draw(st.booleans()) for name in ("bias", "use_rslora")}
    return (d_in, d_out, r, alpha), choices, draw(st.sampled_from(list(SHAPES)))
