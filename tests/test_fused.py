"""The fused form of the LoRA equation beside the readable one: same value, same gradients, less kept and computed."""

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minilora import LoRAConfig, LoRALinear, fused, inject_lora
from tests.support.helpers import (
    SHAPES,
    TOLERANCE,
    TwoReaders,
    assert_equal_value_and_gradients,
    dense_forward,
    layer_cases,
    lora_linear,
    readable_form,
)


def is_fused(layer: nn.Module, x: torch.Tensor) -> bool:
    y = layer(x)  # kept: torch before 2.14 lets a node go with its output
    return "FusedLoRALinear" in type(y.grad_fn).__name__ + str(y.grad_fn.next_functions)


def test_the_fused_form_is_taken_unless_switched_off_or_W_is_trained():
    layer, x = lora_linear(), torch.randn(3, 6, dtype=torch.float64)
    assert is_fused(layer, x)
    with readable_form():
        assert not is_fused(layer, x)
    layer.base_layer.weight.requires_grad_(True)
    assert not is_fused(layer, x)
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad.any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layer_cases())
def test_the_fused_form_equals_the_readable_form(case):
    sizes, options, shape = case
    layer = lora_linear(*sizes, **options)

    def readable(x):
        with readable_form():
            return layer(x)

    assert_equal_value_and_gradients(layer, readable, torch.randn(*SHAPES[shape], sizes[0], dtype=torch.float64), layer)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_fused_form_equals_the_readable_form_under_autocast(device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layer = lora_linear(32, 16, 4, dtype=torch.float32).to(device)

    def cast(x, readable=False):
        with torch.autocast(device, dtype=dtype):
            if not readable:
                return layer(x)
            with readable_form():
                return layer(x)

    x = torch.randn(3, 32, device=device)
    assert_equal_value_and_gradients(cast, lambda x: cast(x, True), x, layer, TOLERANCE[dtype])
    assert_equal_value_and_gradients(cast, lambda x: dense_forward(layer, x), x, layer, TOLERANCE[dtype])


def test_gradcheck_agrees_with_finite_differences():
    layer = lora_linear(4, 3)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.lora_A.weight, layer.lora_B.weight))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_second_derivatives_are_those_of_the_readable_form(p):
    layer = lora_linear(4, 3, lora_dropout=p)
    trained = [layer.lora_A.weight, layer.lora_B.weight]
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def function(x, *_):
        torch.manual_seed(3)
        return layer(x).sin()

    assert torch.autograd.gradgradcheck(function, (x, *trained))


def saved_bytes(function, model: nn.Module) -> tuple[list[tuple], int]:
    """Shapes and total bytes of the distinct activations that a forward keeps for backward; parameters not counted."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (tuple(tensor.shape), storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sorted(shape for shape, _, _ in kept.values()), sum(size for _, size, _ in kept.values())


def test_without_dropout_backward_keeps_x_and_nothing_else():
    layer = LoRALinear(nn.Linear(64, 32), 4, 8)
    x = torch.randn(10, 64)
    assert saved_bytes(lambda: layer(x), layer) == ([(10, 64)], 4 * 10 * 64)


def test_of_an_x_that_is_not_contiguous_no_copy_is_kept():
    layer = LoRALinear(nn.Linear(64, 32), 4, 8)
    x = torch.randn(64, 5, 10).permute(2, 1, 0)  # (10, 5, 64)
    assert saved_bytes(lambda: layer(x), layer)[1] == 4 * 50 * 64


def test_with_dropout_two_siblings_keep_one_mask_bit_per_entry_and_one_dropped_x_together():
    model = inject_lora(TwoReaders(), LoRAConfig(r=4, lora_dropout=0.05, target_modules=("q", "v")))
    h = torch.randn(10, 64, requires_grad=True) * 1
    shapes, size = saved_bytes(lambda: (model.q(h), model.v(h)), model)
    assert shapes == [(10, 64), (80,)]  # dropped x, the mask's bits
    assert size == 4 * 10 * 64 + 10 * 64 // 8


@pytest.mark.parametrize("need_x", [False, True], ids=["x is data", "x needs a gradient"])
def test_backward_multiplies_h_gB_gA_x_and_g_h_only_and_W_only_for_an_x_that_needs_it(need_x):
    N, d_in, d_out, r = 10, 64, 32, 4
    layer = LoRALinear(nn.Linear(d_in, d_out), r, 8)
    y = layer(torch.randn(N, d_in, requires_grad=need_x))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    h, gB, dA, dB = N * r * d_in, N * d_out * r, N * r * d_in, N * r * d_out
    dx = N * d_out * d_in  # g W; the counter does not see the addmm_ of s gB A, done in place
    assert counter.get_total_flops() == 2 * (h + gB + dA + dB + need_x * dx)


def merges(monkeypatch, answer: bool) -> None:
    monkeypatch.setattr(fused, "merging_pays", lambda *_: answer)


@pytest.mark.parametrize("merged", [True, False], ids=["W + s B A", "s h B^T added"])
@pytest.mark.parametrize("need_x", [True, False], ids=["x needs a gradient", "x is data"])
@pytest.mark.parametrize("bias", [True, False])
def test_each_form_equals_the_dense_layer_in_value_and_gradients(monkeypatch, merged, need_x, bias):
    merges(monkeypatch, merged)
    layer = lora_linear(6, 4, r=3, bias=bias)
    x = torch.randn(5, 7, 6, dtype=torch.float64)
    assert_equal_value_and_gradients(layer, lambda x: dense_forward(layer, x), x, layer)
    if not need_x:
        weights, found = torch.linspace(-1, 1, 140, dtype=torch.float64).view(5, 7, 4), []
        for function in (layer, lambda x: dense_forward(layer, x)):
            trained = [layer.lora_A.weight, layer.lora_B.weight]
            found.append(torch.autograd.grad((function(x) * weights).sum(), trained))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_second_derivatives_of_the_merged_form(monkeypatch):
    merges(monkeypatch, True)
    layer = lora_linear(4, 3)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    trained = layer.lora_A.weight, layer.lora_B.weight
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x).sin(), (x, *trained))


def test_W_is_merged_for_many_rows_only_and_never_in_half_precision():
    W, x = torch.zeros(8, 6), torch.zeros(6, 6)  # 6 * (16 + 18) >= 4 * 48
    assert fused.merging_pays(x, W) and fused.merging_pays(x.double(), W.double())
    assert not fused.merging_pays(x[:5], W)
    for dtype in (torch.bfloat16, torch.float16):
        assert not fused.merging_pays(x.to(dtype), W.to(dtype))
    assert not fused.merging_pays(x.to("meta"), W)


def test_with_dropout_nothing_is_merged():
    layer = lora_linear(6, 4, lora_dropout=0.5)
    x = torch.randn(100, 6, dtype=torch.float64)
    torch.manual_seed(0)
    dropped = layer.lora_dropout(x, layer)
    torch.manual_seed(0)
    W, b, A, B = layer.base_layer.weight, layer.base_layer.bias, layer.lora_A.weight, layer.lora_B.weight
    torch.testing.assert_close(layer(x), x @ W.T + b + layer.scaling * dropped @ A.T @ B.T)


def test_an_update_too_small_for_a_weight_in_bf16_is_seen_in_the_answer_all_the_same():
    layer, signs = lora_linear(64, 8, bias=False, dtype=torch.float32), torch.tensor([1.0, -1.0] * 32)
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)  # W x = 0
        layer.lora_A.weight.copy_(5e-4 * signs)
        layer.lora_B.weight.fill_(1.0)
    assert ((layer.base_layer.weight + layer.delta_weight()).bfloat16() == 1).all()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(signs.expand(200, 64))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), torch.full((200, 8), 64 * layer.scaling * 2 * 5e-4), rtol=0.02, atol=0)


def test_in_bf16_h_is_kept_beside_x():
    layer = LoRALinear(nn.Linear(64, 32), 4, 8)
    x = torch.randn(10, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        shapes, size = saved_bytes(lambda: layer(x), layer)
    assert shapes == [(10, 4), (10, 64)] and size == 2 * 10 * (4 + 64)
