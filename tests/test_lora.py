"""The specification of LoRA, one claim per test. Notation as in minilora/lora.py: y = W x + b + s B A dropout(x)."""

import contextlib
import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.utils.checkpoint import checkpoint

from minilora import DoRALinear, LoRAConfig, LoRALinear, inject_lora, merge_lora
from tests.support.helpers import (
    SHAPES,
    TOLERANCE,
    TwoReaders,
    assert_equal_value_and_gradients,
    dense_forward,
    layer_cases,
    lora_linear,
    readable_form,
    same_bits,
    snapshot,
    tiny_vit,
    train_steps,
    two_readers,
)

# ---- the equation, first without any helper


def test_y_is_x_times_W_plus_s_B_A_transposed_and_so_are_its_gradients():
    W = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])  # (out, in) frozen
    A = torch.tensor([[0.5, -1.0, 1.5]])  # (r, in)
    B = torch.tensor([[0.5], [-0.25]])  # (out, r)
    x = torch.tensor([[2.0, 1.0, 1.0], [0.0, -1.0, 3.0]], requires_grad=True)  # (N, in)
    layer = LoRALinear(nn.Linear(3, 2, bias=False), r=1, lora_alpha=2)  # s = 2 / 1
    layer.load_state_dict({"base_layer.weight": W, "lora_A.weight": A, "lora_B.weight": B})
    A, B = A.requires_grad_(), B.requires_grad_()
    y, wanted = layer(x), x @ (W + 2 * B @ A).T
    assert torch.equal(y, wanted)
    found = torch.autograd.grad(y.square().sum(), (layer.lora_A.weight, layer.lora_B.weight, x))
    for ours, dense in zip(found, torch.autograd.grad(wanted.square().sum(), (A, B, x)), strict=True):
        assert torch.equal(ours, dense) and dense.any()


# ---- the equation, for any shape


@settings(max_examples=120, deadline=None, derandomize=True)
@given(layer_cases())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_y_equals_x_times_W_plus_s_B_A_transposed_in_value_and_gradient(dtype, case):
    sizes, options, shape = case
    layer = lora_linear(*sizes, dtype=dtype, **options)
    x = torch.randn(*SHAPES[shape], sizes[0], dtype=dtype)
    assert layer(x).shape == (*SHAPES[shape], sizes[1])
    assert_equal_value_and_gradients(layer, lambda x: dense_forward(layer, x), x, layer)


@pytest.fixture(params=["fused", "readable"])
def gradients(request):
    """(layer, x, g, {name: gradient}) of one backward pass: float64, g = dL/dy, both forms of the sum."""
    layer, x = lora_linear(6, 4), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 4, dtype=torch.float64)
    A, B = layer.lora_A.weight, layer.lora_B.weight
    with contextlib.nullcontext() if request.param == "fused" else readable_form():
        found = torch.autograd.grad(layer(x), (A, B, x), g)
    return layer, x.detach(), g, dict(zip(("A", "B", "x"), found, strict=True))


def test_dL_dB_is_s_times_g_transposed_times_h(gradients):
    layer, x, g, found = gradients
    h = x @ layer.lora_A.weight.T
    assert torch.allclose(found["B"], layer.scaling * g.T @ h, atol=1e-12)


def test_dL_dA_is_s_times_gB_transposed_times_x(gradients):
    layer, x, g, found = gradients
    gB = g @ layer.lora_B.weight
    assert torch.allclose(found["A"], layer.scaling * gB.T @ x, atol=1e-12)


def test_dL_dx_is_g_times_W_plus_s_B_A(gradients):
    layer, _, g, found = gradients
    W, A, B = layer.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight
    assert torch.allclose(found["x"], g @ (W + layer.scaling * B @ A), atol=1e-12)


@pytest.mark.parametrize("r, alpha", [(1, 1), (2, 16), (8, 16), (3, 1)])
def test_s_is_alpha_over_r_and_alpha_over_root_r_for_rslora(r, alpha):
    assert lora_linear(9, 9, r, alpha).scaling == alpha / r
    assert lora_linear(9, 9, r, alpha, use_rslora=True).scaling == alpha / math.sqrt(r)


def test_doubling_alpha_doubles_what_is_added_to_the_base_output():
    layer = lora_linear(alpha=3.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    once = layer(x) - layer.base_layer(x)
    layer.scaling *= 2
    assert torch.allclose(layer(x) - layer.base_layer(x), 2 * once, atol=1e-12)


def test_s_B_A_has_rank_r():
    layer = lora_linear(9, 8, r=3)
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 3


# ---- the beginning


both_layers = pytest.mark.parametrize("layer_class", [LoRALinear, DoRALinear])


@both_layers
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_at_init_B_is_zero_so_y_is_the_base_output_to_the_bit(init, layer_class):
    base = nn.Linear(7, 5)
    x = torch.randn(4, 7)
    wanted = base(x)
    assert torch.equal(layer_class(base, 3, 6, init_lora_weights=init)(x), wanted)


def test_at_init_dL_dB_is_not_zero_and_dL_dA_is():
    layer = LoRALinear(nn.Linear(7, 5), 3, 6)
    layer(torch.randn(4, 7)).square().sum().backward()
    assert layer.lora_B.weight.grad.abs().min() > 0
    assert not layer.lora_A.weight.grad.any()


def test_at_init_A_is_uniform_between_minus_and_plus_1_over_root_in():
    A = LoRALinear(nn.Linear(400, 10), 50, 50).lora_A.weight
    assert A.shape == (50, 400)
    bound = 1 / math.sqrt(400)  # with A stored (in, r) this would be 1 / sqrt(50)
    assert 0.999 * bound < A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_at_gaussian_init_A_has_deviation_1_over_r():
    A = LoRALinear(nn.Linear(400, 10), 8, 8, init_lora_weights="gaussian").lora_A.weight
    assert A.std().item() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize("bad", [{"r": 0}, {"r": -1}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}])
def test_impossible_rank_or_dropout_is_refused(bad):
    with pytest.raises(ValueError, match="r >= 1 and 0 <= lora_dropout < 1"):
        LoRALinear(nn.Linear(3, 3), **{"r": 1, "lora_alpha": 1, **bad})
    with pytest.raises(ValueError, match="init_lora_weights"):
        LoRALinear(nn.Linear(3, 3), 1, 1, init_lora_weights="pissa")


def test_use_dora_is_refused_and_the_class_for_it_named():
    with pytest.raises(ValueError, match="minilora.DoRALinear"):
        LoRALinear(nn.Linear(3, 3), 1, 1, use_dora=True)


# ---- what is trained


@both_layers
def test_only_A_and_B_and_m_get_a_gradient_the_base_never(layer_class):
    layer = layer_class(nn.Linear(6, 4), 2, 4, init_lora_weights=False)
    layer(torch.randn(3, 6)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == name.startswith("lora_"), name
        assert parameter.grad is None or parameter.grad.any(), name


@both_layers
@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_trainable_tensors_are_float32_whatever_the_base_and_the_output_keeps_its_dtype(base, layer_class):
    layer = layer_class(nn.Linear(6, 4, dtype=base), 2, 4, init_lora_weights=False)
    wanted = torch.float64 if base == torch.float64 else torch.float32
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {wanted}
    x = torch.randn(3, 6, dtype=base)
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == layer.merged().weight.dtype == base
    assert layer.lora_A.weight.grad.dtype == wanted
    merged = layer.merged()(x)
    assert torch.allclose(y.double(), merged.double(), atol=TOLERANCE[base])


def test_there_is_no_weight_to_read_behind_the_back_of_LoRA():
    layer = lora_linear()
    for name in ("weight", "bias"):
        with pytest.raises(AttributeError, match="reads the weights of this layer instead of calling it"):
            getattr(layer, name)
    assert not hasattr(layer, "weight")


# ---- dropout(x)


def test_dropout_is_drawn_in_train_mode_only_and_on_the_low_rank_path_only():
    layer = lora_linear(64, 4, lora_dropout=0.5)
    x = torch.randn(8, 64, dtype=torch.float64)
    assert torch.equal(layer.eval()(x), layer(x))
    assert torch.allclose(layer(x), dense_forward(layer, x), atol=1e-12)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.lora_B.weight)
    assert torch.allclose(layer(x), layer.base_layer(x), atol=1e-12)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "readable"])
def test_with_mask_d_y_is_W_x_plus_s_B_A_d_x_and_the_gradient_has_the_same_d(fused):
    layer = lora_linear(6, 4, lora_dropout=0.4)
    mask = (torch.rand(3, 6, dtype=torch.float64) > 0.4) / 0.6
    layer.lora_dropout.forward = lambda x, layer: x * mask

    def wanted(x):
        A, B = layer.lora_A.weight, layer.lora_B.weight
        return layer.base_layer(x) + layer.scaling * (x * mask) @ (B @ A).T

    with contextlib.nullcontext() if fused else readable_form():
        assert_equal_value_and_gradients(layer, wanted, torch.randn(3, 6, dtype=torch.float64), layer)


# ---- merging


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layer_cases())
def test_merged_is_a_plain_linear_of_weight_W_plus_s_B_A_with_the_same_y_and_leaves_W_alone(case):
    sizes, options, shape = case
    layer = lora_linear(*sizes, **options).eval()
    before = snapshot(layer)
    plain = layer.merged()
    x = torch.randn(*SHAPES[shape], sizes[0], dtype=torch.float64)
    assert type(plain) is nn.Linear and torch.allclose(plain(x), layer(x), atol=1e-12)
    assert same_bits(before, snapshot(layer))


# ---- the module as a citizen of torch


@both_layers
def test_on_the_meta_device_shapes_are_computed_forward_and_merged(layer_class):
    with torch.device("meta"):
        layer, x = layer_class(nn.Linear(6, 4), 2, 4), torch.randn(3, 6)
    assert layer(x).shape == (3, 4) and layer(x).is_meta
    assert layer.merged().weight.shape == layer.delta_weight().shape == (4, 6)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "readable"])
def test_autocast_changes_the_precision_of_float32_and_leaves_float64_alone(fused):
    for dtype, wanted in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        layer, x = lora_linear(dtype=dtype), torch.randn(3, 6, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext() if fused else readable_form():
            assert layer(x).dtype == layer.base_layer(x).dtype == wanted


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "readable"])
def test_under_autocast_a_base_in_half_precision_gives_the_bits_of_a_float32_base(fused):
    layer, x = lora_linear(dtype=torch.float32), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext() if fused else readable_form():
        wanted = layer(x)
        layer.base_layer.to(torch.bfloat16)
        assert torch.equal(layer(x), wanted) and wanted.dtype == torch.bfloat16


def test_the_old_command_of_the_worked_example_names_the_new_one():
    done = subprocess.run([sys.executable, "-m", "minilora.lora"], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: the worked example is now: python -m minilora.lessons.equation\n"


def test_train_and_eval_leave_the_state_dict_untouched():
    model = two_readers()
    before = snapshot(model)
    for mode in (True, False, True):
        model.train(mode)
        model(torch.randn(3, 64))
        assert same_bits(before, snapshot(model))


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_deepcopy_and_pickle_after_training_steps_give_the_same_function(dora):
    config = LoRAConfig(r=4, lora_dropout=0.3, target_modules=("q", "v"), use_dora=dora)
    model, x = inject_lora(TwoReaders(), config), torch.randn(5, 64)
    train_steps(model, lambda model: model(x), steps=2)
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert twin.q.lora_dropout is twin.v.lora_dropout
        twin.q.lora_A.weight.data.zero_()
        assert model.q.lora_A.weight.any()


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_torch_compile_traces_the_layer_without_graph_breaks(p, dora):
    config = LoRAConfig(r=4, lora_dropout=p, target_modules=("q", "v"), use_dora=dora, init_lora_weights=False)
    model, x = inject_lora(TwoReaders(), config), torch.randn(5, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.allclose(compiled.eval()(x), model.eval()(x), atol=1e-5)


def gradients_of(model: nn.Module, forward) -> dict[str, torch.Tensor]:
    """Gradients of one backward pass with the random numbers of seed 3."""
    torch.manual_seed(3)
    model.zero_grad()
    forward().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients_with_dropout(p):
    model, x = two_readers(p), torch.randn(5, 64)
    plain = gradients_of(model, lambda: model(x))
    assert same_bits(plain, gradients_of(model, lambda: checkpoint(model, x, use_reentrant=False)))


def test_checkpointing_a_single_layer_draws_the_same_mask_again():
    layer, x = lora_linear(64, 4, lora_dropout=0.5), torch.randn(5, 64, dtype=torch.float64)
    plain = gradients_of(layer, lambda: layer(x))
    assert same_bits(plain, gradients_of(layer, lambda: checkpoint(layer, x, use_reentrant=False)))


def test_a_checkpointed_vit_has_the_gradients_of_the_plain_one_with_dropout():
    model = inject_lora(tiny_vit(), LoRAConfig(r=2, lora_dropout=0.2, init_lora_weights=False)).train()
    x = torch.randn(2, 3, 32, 32)
    plain = gradients_of(model, lambda: model(x))
    model.grad_checkpointing = True
    assert same_bits(plain, gradients_of(model, lambda: model(x)))


def test_training_with_lora_lowers_the_loss_and_merging_keeps_what_was_learned():
    model = inject_lora(tiny_vit(), LoRAConfig(r=4, target_modules=("q_proj", "v_proj", "fc1")))
    x = torch.randn(6, 3, 32, 32)
    losses = train_steps(model, lambda model: model(x), steps=12, lr=0.02)
    assert losses[-1] < 0.7 * losses[0]
    wanted = model.eval()(x)
    assert torch.allclose(merge_lora(model)(x), wanted, atol=1e-4)
