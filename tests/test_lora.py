"""The specification of LoRA, one claim per test. Notation as in minilora/lora.py: y = W x + b + s B A dropout(x)."""

import contextlib
import copy
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.utils.checkpoint import checkpoint

from minilora import LoRAConfig, LoRALinear, inject_lora, merge_lora
from minilora.inject import lora_layers
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

# ---- the equation


@settings(max_examples=120, deadline=None, derandomize=True)
@given(layer_cases())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_y_equals_x_times_W_plus_s_B_A_transposed_in_value_and_gradient(dtype, case):
    sizes, options, shape = case
    layer = lora_linear(*sizes, dtype=dtype, **options)
    x = torch.randn(*SHAPES[shape], sizes[0], dtype=dtype)
    assert layer(x).shape == (*SHAPES[shape], sizes[1])
    assert_equal_value_and_gradients(layer, lambda x: dense_forward(layer, x), x, layer)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "readable"])
def test_dL_dB_is_s_g_A_x_transposed_dL_dA_is_s_B_transposed_g_x_transposed_dL_dx_is_W_plus_s_B_A_transposed_g(fused):
    """g = dL/dy of columns x; summed over the rows of a batch."""
    layer, x = lora_linear(6, 4), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 4, dtype=torch.float64)
    W, A, B, s = layer.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.scaling
    with contextlib.nullcontext() if fused else readable_form():
        layer(x).backward(g)
    with torch.no_grad():
        assert torch.allclose(B.grad, s * g.T @ (x @ A.T), atol=1e-12)
        assert torch.allclose(A.grad, s * B.T @ g.T @ x, atol=1e-12)
        assert torch.allclose(x.grad, g @ (W + s * B @ A), atol=1e-12)


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


def test_dora_row_i_of_W_plus_dW_has_the_trained_length_m_i():
    layer = lora_linear(use_dora=True)
    updated = layer.base_layer.weight + layer.delta_weight()
    assert torch.allclose(updated.norm(dim=1), layer.lora_magnitude_vector, atol=1e-12)


# ---- the beginning


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_at_init_B_is_zero_so_y_is_the_base_output_to_the_bit(init, dora):
    base = nn.Linear(7, 5)
    x = torch.randn(4, 7)
    wanted = base(x)
    assert torch.equal(LoRALinear(base, 3, 6, init_lora_weights=init, use_dora=dora)(x), wanted)


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


# ---- what is trained


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_only_A_and_B_and_m_get_a_gradient_the_base_never(dora):
    layer = LoRALinear(nn.Linear(6, 4), 2, 4, init_lora_weights=False, use_dora=dora)
    layer(torch.randn(3, 6)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == name.startswith("lora_"), name
        assert parameter.grad is None or parameter.grad.any(), name


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_trainable_tensors_are_float32_whatever_the_base_and_the_output_keeps_its_dtype(base, dora):
    layer = LoRALinear(nn.Linear(6, 4, dtype=base), 2, 4, init_lora_weights=False, use_dora=dora)
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


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_with_mask_d_y_is_W_x_plus_s_B_A_d_x_and_the_gradient_has_the_same_d(dora):
    layer = lora_linear(6, 4, lora_dropout=0.4, use_dora=dora)
    mask = (torch.rand(3, 6, dtype=torch.float64) > 0.4) / 0.6
    layer.lora_dropout.forward = lambda x, reader: x * mask

    def wanted(x):
        W, A, B = layer.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight
        V = W + layer.scaling * B @ A
        gain = layer.lora_magnitude_vector / V.detach().norm(dim=1) if dora else torch.ones(4)
        return layer.base_layer(x) + (x * mask) @ (gain[:, None] * V - W).T

    assert_equal_value_and_gradients(layer, wanted, torch.randn(3, 6, dtype=torch.float64), layer)


def masks_of(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each layer's dropout gave in one forward pass."""
    seen, original = {}, type(model.q.lora_dropout).forward
    names = {id(layer): name for name, layer in lora_layers(model)}

    def spy(self, x, reader):
        return seen.setdefault(names[id(reader)], original(self, x, reader))

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


def test_torch_save_of_an_input_after_training_holds_the_tensor_alone():
    model, x = two_readers(), torch.randn(5, 64, requires_grad=True)
    model(x)
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), x)


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


# ---- the worked example


def test_worked_example_by_hand_equals_the_code_digit_by_digit():
    from minilora.lessons.equation import by_code, by_hand, working

    hand, code = by_hand(), by_code()
    assert hand == code
    for name, _, entries in working(hand):  # the printed arithmetic itself gives the printed result
        assert [eval(entry) for entry in entries] == hand[name], name


def test_worked_example_prints_from_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "minilora.lessons.equation"], capture_output=True, text=True, check=True
    )
    assert "agree in every digit" in done.stdout and "DIFFER" not in done.stdout
    assert "0.5*2 + -1*1 + 1.5*1" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100 and not done.stderr
