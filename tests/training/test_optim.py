"""minilora/training/optim.py: groups, schedules and clipping against their closed forms and against torch."""

import math

import pytest
import torch
from torch import nn

from minilora import LoRAConfig, inject_lora
from minilora.errors import UserError
from minilora.settings.flags import Config, rules
from minilora.training import optim
from tests.support.toy_task import ToyModel


def test_the_flags_name_exactly_the_optimizers_and_schedules_that_there_are():
    table = rules(Config)
    assert set(table["opt"].choices) == set(optim.OPTIMIZERS) and set(table["sched"].choices) == set(optim.SCHEDULES)


def test_every_schedule_passes_through_its_closed_forms_points():
    def points(sched, steps):
        return [optim.schedule_factor(sched, s, total=110, warmup=10) for s in steps]

    for sched in optim.SCHEDULES:
        assert points(sched, (0, 4, 9)) == [0.1, 0.5, 1.0], "warm-up ends at the full rate"
    assert points("linear", (10, 60, 109, 110, 500)) == pytest.approx([1.0, 0.5, 0.01, 0.0, 0.0])
    assert points("cosine", (10, 35, 60, 110)) == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, 0.0])
    assert points("constant", (10, 60, 109)) == [1.0, 1.0, 1.0]
    assert optim.schedule_factor("linear", 0, total=1, warmup=0) == 1.0
    with pytest.raises(UserError, match="cosine"):
        optim.schedule_factor("cosin", 0, 10, 0)


def test_plateau_gives_the_rates_of_torchs_reduce_on_plateau():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    ours = optim.Plateau()
    losses = [3.0, 2.0, 2.0, 2.0, 2.0, 1.99999, 2.0, 2.0, 1.0, 1.1, 1.2, 1.3, 1.0, 0.9] + [0.9] * 9
    factors = []
    for loss in losses:
        oracle.step(loss)
        ours.update(loss)
        factors.append(ours.factor)
        assert ours.factor == optimizer.param_groups[0]["lr"]
    assert len(set(factors)) >= 4, "the losses must make it act"
    ours.update(float("nan"))
    assert ours.best == 0.9


def test_matrices_decay_vectors_do_not_and_the_head_has_its_rate():
    model = ToyModel(0.0, norm=True)
    groups = optim.parameter_groups(model, lr=1e-3, head_lr=1e-2, weight_decay=0.1)
    found = {
        name: (group["lr"], group["weight_decay"])
        for name, p in model.named_parameters()
        for group in groups
        if any(p is q for q in group["params"])
    }
    assert found == {
        "norm.weight": (1e-3, 0.0),
        "norm.bias": (1e-3, 0.0),
        "body.weight": (1e-3, 0.1),
        "body.bias": (1e-3, 0.0),
        "head.weight": (1e-2, 0.1),
        "head.bias": (1e-2, 0.0),
    }
    same = optim.parameter_groups(model, lr=1e-3, head_lr=None, weight_decay=0.1)
    assert [len(g["params"]) for g in same] == [4, 2]
    optimizer = optim.build_optimizer(model, "adamw", 1e-3, 1e-2, 0.1)
    assert optim.set_learning_rate(optimizer, 0.5) == 5e-4
    assert {g["lr"] for g in optimizer.param_groups} == {5e-4, 5e-3}


def test_lora_plus_gives_b_a_multiple_of_a_s_rate_in_one_step_of_adamw():
    """Against the definition, by hand: w <- w - rate (wd w + g / (|g| + eps)) in the first step of AdamW."""
    model = inject_lora(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), LoRAConfig(r=2, target_modules=("0",)))
    model[1].requires_grad_(True)
    model.head_modules = ("1",)
    nn.init.normal_(model[0].lora_B.weight)
    ratio, lr, head_lr, decay, factor = 16.0, 1e-2, 3e-2, 0.1, 0.25
    optimizer = optim.build_optimizer(model, "adamw", lr, head_lr, decay, ratio)
    assert optim.set_learning_rate(optimizer, factor) == lr * factor
    model(torch.randn(6, 5)).square().sum().backward()
    rates = {"0.lora_A.weight": lr, "0.lora_B.weight": ratio * lr, "1.weight": head_lr, "1.bias": head_lr}
    before = {name: p.detach().double().clone() for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}
    assert before.keys() == rates.keys()
    optimizer.step()
    for name, p in model.named_parameters():
        if name in rates:
            g, rate, wd = gradients[name], factor * rates[name], decay * (p.ndim > 1)
            wanted = before[name] * (1 - rate * wd) - rate * g / (g.abs() + 1e-8)
            assert torch.allclose(p.double(), wanted, rtol=0, atol=1e-6), name
            assert (before[name] - wanted).abs().max() > 0.5 * rate


def test_trainable_tensors_must_be_float32_and_there_must_be_one():
    model = ToyModel(0.0, norm=False)
    model.body.half()
    with pytest.raises(UserError, match="body.weight is torch.float16"):
        optim.build_optimizer(model, "adamw", 1e-3)
    model.body.float()
    model.frozen.half()
    assert len(optim.trainable_parameters(model)) == 4, "the frozen part may be float16"
    model.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        optim.build_optimizer(model, "adamw", 1e-3)


@pytest.mark.parametrize("opt", optim.OPTIMIZERS)
def test_fused_optimizer_equals_the_plain_one(opt):
    plain = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[opt]
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    a = optim.build_optimizer(ours, opt, lr=0.1, weight_decay=0.2)
    assert bool(a.param_groups[0]["fused"]) == (opt != "sgd")
    groups = [{"params": [theirs.weight], "weight_decay": 0.2}, {"params": [theirs.bias], "weight_decay": 0.0}]
    b = plain(groups, lr=0.1, fused=False, **({"momentum": 0.9} if opt == "sgd" else {}))
    for _ in range(5):
        x = torch.randn(4, 5)
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overflows", [(0,), (0, 1, 2), (2,), (1, 4)])
@pytest.mark.parametrize("opt", optim.OPTIMIZERS)
def test_an_overflow_in_fp16_leaves_no_trace_in_any_optimizer(opt, overflows):
    """The weights are, bit for bit, those of a run that never had the overflowing steps."""
    steps = torch.randn(6, 4, 5).unbind()
    models = [nn.Linear(5, 3), nn.Linear(5, 3)]
    models[1].load_state_dict(models[0].state_dict())
    scaled, plain = (optim.build_optimizer(model, opt, lr=0.1, weight_decay=0.2) for model in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        for number, x in enumerate(steps):
            for model, optimizer in zip(models, (scaled, plain), strict=True):
                optimizer.zero_grad()
                loss = model(x).square().sum()
                if optimizer is scaled:
                    scaler.scale(loss).backward()
                    if number in overflows:
                        model.bias.grad[1] = math.inf
                    scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
                elif number not in overflows:
                    loss.backward()
                    optimizer.step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert scaler.get_scale() == 2.0 ** (10 - len(overflows))
    assert models[0].weight.isfinite().all()
    assert torch.equal(models[0].weight, models[1].weight) and torch.equal(models[0].bias, models[1].bias)


def test_unknown_optimizer_lists_the_choices():
    with pytest.raises(UserError, match="adamw, adam, sgd"):
        optim.build_optimizer(nn.Linear(2, 2), "lion", 1e-3)


def test_clipping_scales_to_the_norm_and_always_reports_it():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    for max_norm, expected in ((0.0, 5.0), (1.0, 1.0), (10.0, 5.0)):
        parameters[0].grad = torch.tensor([3.0, 0.0, 0.0])
        parameters[1].grad = torch.tensor([0.0, 4.0, 0.0, 0.0])
        norm = optim.gradient_norm(parameters).item()
        assert norm == 5.0
        optim.clip_gradients(parameters, norm, max_norm)
        after = torch.cat([parameters[0].grad, parameters[1].grad]).norm().item()
        assert after == pytest.approx(expected, rel=1e-5)
