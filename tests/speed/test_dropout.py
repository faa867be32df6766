"""Dropout on the low-rank path: the distribution of plain dropout, one mask for all readers of an x."""

import io

import pytest
import torch
from torch import nn

from minilora import LoRALinear
from minilora.inject import lora_layers
from tests.support.helpers import readable_form, two_readers


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "readable"])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_of_x_has_the_mean_of_x_and_drops_the_share_p(p, fused):
    layer = LoRALinear(nn.Linear(1000, 1), 1, 1, lora_dropout=p)
    x = torch.rand(200, 1000) + 1
    with torch.no_grad():
        if fused:
            dropped = layer.lora_dropout(x, layer)
        else:
            with readable_form():
                dropped = layer.lora_dropout(x, layer)
    kept = dropped != 0
    assert (1 - kept.float().mean()).item() == pytest.approx(p, abs=0.004)
    assert torch.allclose(dropped[kept], x[kept] / (1 - p), rtol=2e-4)
    assert (dropped.mean() / x.mean()).item() == pytest.approx(1, abs=0.03)


def masks_of(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each layer's dropout gave in one forward pass."""
    seen, original = {}, type(model.q.lora_dropout).forward
    names = {id(layer): name for name, layer in lora_layers(model)}

    def spy(self, x, layer):
        return seen.setdefault(names[id(layer)], original(self, x, layer))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.q.lora_dropout), "forward", spy)
        model(x)
    return seen


def test_siblings_that_read_the_same_x_share_one_mask_and_others_do_not():
    model, x = two_readers(), torch.randn(5, 64)
    masks = masks_of(model, x)
    assert masks["q"] is masks["v"]
    assert not torch.equal(masks["out"] == 0, masks["q"] == 0)


def test_the_next_forward_draws_a_new_mask_even_on_the_same_tensor():
    model, x = two_readers(), torch.rand(5, 64)
    q = model.q
    first, second = (q.lora_dropout(x, q) for _ in range(2))
    assert not torch.equal(first, second)
    assert q.lora_dropout(x, model.v) is second
    x.add_(1)  # changed in place: the old result no longer belongs to it
    assert q.lora_dropout(x, model.out) is not second


def test_a_pass_without_gradient_leaves_nothing_that_a_pass_with_gradient_would_reuse():
    model = two_readers()
    x = torch.rand(5, 64, requires_grad=True) * 1
    with torch.no_grad():
        model.q(x)
    assert model.v.lora_dropout(x, model.v).requires_grad


def test_torch_save_of_an_input_after_training_holds_the_tensor_alone():
    model, x = two_readers(), torch.randn(5, 64, requires_grad=True)
    model(x)
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), x)
