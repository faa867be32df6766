"""oneDNN's products in place of MKL's change rounding and nothing else."""

import copy

import pytest
import torch
from torch import nn

from minilora.speed import gemm

needs_onednn = pytest.mark.skipif(not gemm.available, reason="this torch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN on whatever the processor, also for the small tensors of a test."""
    monkeypatch.setattr(gemm, "onednn", True)
    monkeypatch.setattr(gemm, "SMALLEST", 0)


def gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_(True)
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [x, *trained])]


@needs_onednn
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (3, 0, 12)])
def test_fast_linear_equals_nn_linear_in_value_and_gradients(onednn, trained, bias, shape):
    plain = nn.Linear(12, 20, bias=bias).requires_grad_(trained)
    fast = gemm.speed_up(nn.Sequential(copy.deepcopy(plain)))[0]
    assert type(fast) is gemm.FastLinear
    x = torch.randn(shape)
    for a, b in zip(gradients(fast, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_a_frozen_fast_linear_keeps_no_input_for_backward(onednn):
    layer = gemm.speed_up(nn.Sequential(nn.Linear(12, 20).requires_grad_(False)))[0]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        layer(torch.randn(4, 12, requires_grad=True))
    assert kept == [layer.weight.data_ptr()]


@needs_onednn
def test_second_derivatives_of_a_fast_linear_are_those_of_nn_linear(onednn):
    layer = gemm.speed_up(nn.Sequential(nn.Linear(3, 2)))
    x = torch.randn(4, 3, requires_grad=True)
    first = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x)[0]
    plain = nn.Sequential(nn.Linear(3, 2))
    plain.load_state_dict(layer.state_dict())
    expected = torch.autograd.grad(plain(x).pow(3).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 5), (0, 5)])
def test_a_narrow_product_equals_the_plain_one(shape, dtype):
    x, A = torch.randn(shape, dtype=dtype), torch.randn(3, 5, dtype=dtype)
    found = gemm.narrow(x, A)
    assert found.shape == (len(x), 3)
    torch.testing.assert_close(found, x @ A.T)


@needs_onednn
def test_small_products_are_left_to_the_other_library(monkeypatch):
    monkeypatch.setattr(gemm, "onednn", True)
    called = []
    monkeypatch.setattr(gemm, "SMALLEST", 7 * 12 * 20)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, *_: called.append(len(x)), raising=False)
    for rows in (7, 8):
        gemm.product(torch.randn(rows, 12), torch.randn(20, 12))
    assert called == [8]
