"""Attention by torch's fused kernel and written out: the same value and gradients, and a fixed rule between the two."""

import pytest
import torch
from torch import Tensor

from minilora import LoRAConfig, inject_lora
from reference_models import layers, processor
from reference_models.layers import Attention
from reference_models.text_layers import CausalAttention

B, T, DIM, HEADS = 3, 7, 32, 4
MASKS = {
    "no mask": lambda: None,
    "padding": lambda: (torch.arange(T) < torch.tensor([[7], [4], [1]]))[:, None, None],
    "bias": lambda: torch.randn(1, HEADS, T, T, dtype=torch.float64),
}


@pytest.fixture
def form(monkeypatch):
    """form(True) makes every layer use the form that is written out, form(False) the fused one."""
    return lambda written: monkeypatch.setattr(layers, "written_out_pays", lambda *_: written)


def value_and_gradients(layer: Attention, x: Tensor, *arguments) -> list[Tensor]:
    x = x.detach().clone().requires_grad_(True)
    y = layer(x, *arguments)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    return [y, *torch.autograd.grad((y.double() * weights).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("rows", [None, 2], ids=["all tokens", "one token"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", [Attention, CausalAttention])
def test_both_forms_have_the_same_value_and_gradients(form, kind, mask, rows):
    torch.manual_seed(0)
    layer, x, mask = kind(DIM, HEADS).double(), torch.randn(B, T, DIM, dtype=torch.float64), MASKS[mask]()
    if mask is not None and rows is not None and mask.shape[-2] == T:
        mask = mask[..., rows : rows + 1, :]
    results = []
    for written in (False, True):
        form(written)
        results.append(value_and_gradients(layer, x, mask, rows))
    for fused, written in zip(*results, strict=True):
        assert (written - fused).abs().max() <= 1e-9 * max(fused.std().item(), 1e-3)


@pytest.mark.parametrize("written", [False, True], ids=["fused", "written out"])
def test_in_bf16_each_form_stays_as_close_to_float64_as_bf16_allows(form, written):
    torch.manual_seed(0)
    layer, x = Attention(DIM, HEADS), torch.randn(B, T, DIM)
    exact = value_and_gradients(Attention.double(layer), x.double())
    form(written)
    with torch.autocast("cpu", torch.bfloat16):
        rough = value_and_gradients(layer.float(), x)
    for a, b in zip(rough, exact, strict=True):
        # the sum over keys' gradients vanishes, since a softmax does not see what is added to all scores
        assert (a - b).abs().max() <= 0.05 * max(b.abs().max().item(), 0.2)


@pytest.mark.parametrize(
    ("instructions", "dtype", "training", "answer"),
    [
        ({"avx512f", "avx512_bf16", "amx_bf16"}, torch.bfloat16, "written out", "fused"),
        ({"avx512f", "avx512_bf16"}, torch.bfloat16, "written out", "written out"),
        ({"avx512f"}, torch.bfloat16, "written out", "fused"),
        ({"avx2"}, torch.bfloat16, "fused", "fused"),
        ({"avx512f", "avx512_bf16", "amx_bf16"}, torch.float32, "fused", "fused"),
        ({"avx512f", "avx512_bf16"}, torch.float16, "fused", "fused"),
    ],
)
def test_the_form_follows_processor_precision_and_whether_a_gradient_is_wanted(
    monkeypatch, instructions, dtype, training, answer
):
    monkeypatch.setattr(processor, "instructions", lambda: frozenset(instructions))
    q, k, v = (torch.zeros(1, 1, 2, 4, dtype=dtype, requires_grad=name == "v") for name in "qkv")
    assert processor.written_out_pays(q, k, v) == (training == "written out")
    assert processor.written_out_pays(q, k, v.detach()) == (answer == "written out")
    with torch.no_grad():
        assert processor.written_out_pays(q, k, v) == (answer == "written out")
    assert not processor.written_out_pays(*(x.to("meta") for x in (q, k, v)))


def test_under_autocast_q_k_and_v_keep_one_rounded_x_together():
    layer = torch.nn.Sequential(Attention(DIM, HEADS))
    inject_lora(layer, LoRAConfig(r=2, target_modules=("q_proj", "k_proj", "v_proj"), init_lora_weights=False))
    x, kept = torch.randn(B, T, DIM, requires_grad=True) * 1, {}

    def pack(tensor):
        if tensor.shape == x.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    before = set(map(id, layer.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert before == set(map(id, layer.parameters()))
    rounded = [tensor for tensor in kept.values() if torch.equal(tensor.float(), x.bfloat16().float())]
    assert len(rounded) == 1 and rounded[0].dtype == torch.bfloat16


def test_autocast_leaves_float64_alone_and_shapes_are_found_on_the_meta_device():
    layer, x = Attention(DIM, HEADS), torch.randn(B, T, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64
    with torch.device("meta"):
        assert Attention(DIM, HEADS)(torch.empty(B, T, DIM)).shape == x.shape
