"""DoRA, one claim per test: y = b + (m / |V|) V x with V = W + s B A, |V| constant in backward (minilora/dora.py)."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from minilora import DoRALinear, LoRAConfig, LoRALinear, inject_lora, merge_lora
from minilora.inject import lora_layers
from tests.support.helpers import (
    SHAPES,
    TOLERANCE,
    TwoReaders,
    assert_equal_value_and_gradients,
    dora_linear,
    layer_cases,
    readable_form,
)


def dense(layer: DoRALinear, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    """The definition with matmul alone: W meets x, what is added to W meets x * mask."""
    W, b, m = layer.base_layer.weight, layer.base_layer.bias, layer.lora_magnitude_vector
    V = W + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight  # (out, in)
    length = V.detach().square().sum(1).sqrt()  # section 4.3: a constant in backward
    added = (m / length)[:, None] * V - W
    return x @ W.T + (x * mask) @ added.T + (0 if b is None else b)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(layer_cases())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_y_is_x_times_m_over_norm_V_times_V_transposed_in_value_and_gradient(dtype, case):
    sizes, options, shape = case
    layer = dora_linear(*sizes, dtype=dtype, **options)
    x = torch.randn(*SHAPES[shape], sizes[0], dtype=dtype)
    # W x is taken away and added again: up to three more roundings of a number of its size
    assert_equal_value_and_gradients(layer, lambda x: dense(layer, x), x, layer, 5 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_under_autocast_value_and_gradients_are_the_dense_ones_up_to_its_rounding(dtype):
    layer = dora_linear(32, 16, 4, dtype=torch.float32)

    def cast(x):
        with torch.autocast("cpu", dtype=dtype):
            return layer(x)

    assert_equal_value_and_gradients(cast, lambda x: dense(layer, x), torch.randn(3, 32), layer, TOLERANCE[dtype])


def test_with_mask_d_only_the_correction_meets_d_and_the_gradient_has_the_same_d():
    layer = dora_linear(lora_dropout=0.4)
    mask = (torch.rand(3, 6, dtype=torch.float64) > 0.4) / 0.6
    layer.lora_dropout.forward = lambda x, layer: x * mask
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_equal_value_and_gradients(layer, lambda x: dense(layer, x, mask), x, layer)


def test_gradcheck_of_x_and_m_agrees_with_finite_differences():
    """A and B are left out: |V| depends on them and is held constant in backward."""
    layer = dora_linear(4, 3)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, m: layer(x), (x, layer.lora_magnitude_vector))


def test_switching_speed_off_changes_nothing():
    layer, x = dora_linear(), torch.randn(3, 6, dtype=torch.float64)
    with readable_form():
        wanted = layer(x)
    assert torch.equal(layer(x), wanted)


def test_row_i_of_W_plus_dW_has_the_trained_length_m_i():
    layer = dora_linear()
    updated = layer.base_layer.weight + layer.delta_weight()
    assert torch.allclose(updated.norm(dim=1), layer.lora_magnitude_vector, atol=1e-12)


def test_at_the_beginning_m_is_the_length_of_each_row_of_W():
    base = nn.Linear(7, 5)
    layer = DoRALinear(base, 3, 6)
    assert torch.allclose(layer.lora_magnitude_vector, base.weight.norm(dim=1), rtol=1e-6)


def test_merged_is_a_plain_linear_with_the_same_y():
    layer, x = dora_linear().eval(), torch.randn(3, 6, dtype=torch.float64)
    plain = layer.merged()
    assert type(plain) is nn.Linear and torch.allclose(plain(x), layer(x), atol=1e-12)


def test_the_names_of_its_tensors_are_those_of_LoRA_and_lora_magnitude_vector():
    lora, dora = (kind(nn.Linear(3, 2), 1, 1).state_dict() for kind in (LoRALinear, DoRALinear))
    assert list(dora) == ["lora_magnitude_vector", *lora]


@pytest.mark.parametrize("use_dora, kind", [(False, LoRALinear), (True, DoRALinear)])
def test_the_configuration_chooses_the_class_and_merging_takes_it_out_again(use_dora, kind):
    model = inject_lora(TwoReaders(), LoRAConfig(target_modules=("q", "v"), use_dora=use_dora))
    assert [type(layer) for _, layer in lora_layers(model)] == [kind, kind]
    assert type(merge_lora(model).q) is nn.Linear
