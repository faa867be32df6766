"""On a real GPU what shapes alone cannot show (training/test_fake_cuda.py): numbers, waits, a resumed run's bits."""

import copy
import signal
import warnings

import pytest
import torch
import torch.distributed as dist

from minilora import LoRAConfig, inject_lora
from minilora.inject import cast_frozen
from minilora.settings.flags import Config
from minilora.signals import Interrupted
from minilora.tasks.load import build_task
from minilora.training.device import Feed, set_deterministic
from minilora.training.trainer import Trainer, TrainOptions
from reference_models.load import FAMILIES
from tests.support.families import inputs_of, small_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# a unit in the last place of a product's inputs, times a few layers
BOUNDS = {None: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def step(model, inputs, amp, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, all trainable gradients in a row) of one pass, float64 on the CPU."""
    dtype = next(model.parameters()).dtype if amp is None else None
    inputs = [x.to(device, dtype if x.is_floating_point() else None) for x in inputs]
    with torch.autocast(device, dtype=amp or torch.bfloat16, enabled=amp is not None):
        found = model(*inputs)
    found = next(x for x in reversed(found) if x is not None) if isinstance(found, tuple) else found
    weights = torch.linspace(-1, 1, found.numel(), device=device).view(found.shape)
    scale = 1024.0 if amp == torch.float16 else 1.0
    (found.to(weights.dtype) * weights * scale).sum().backward()
    gradients = [(p.grad / scale).flatten() for p in model.parameters() if p.grad is not None]
    return found.detach().double().cpu(), torch.cat(gradients).double().cpu()


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("amp", BOUNDS, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "method", [{}, {"use_dora": True}, {"target_modules": "all-linear"}], ids=lambda m: str(list(m))
)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("mobilenet", "student")])
def test_a_lora_step_is_that_of_float64_on_the_cpu_up_to_its_precision(family, method, amp):
    model = small_model(family)
    if family == "swinv2":  # its scores are cosines times 10: with random weights ten times the rounding, on a CPU too
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                torch.nn.init.zeros_(parameter)  # times 1
    inject_lora(model, LoRAConfig(init_lora_weights=False, **method)).train()
    inputs = inputs_of(family, model)
    exact = step(copy.deepcopy(model).double(), inputs, None, "cpu")
    bound = BOUNDS[amp]
    for base in {torch.float32, amp or torch.float32}:
        found = step(cast_frozen(copy.deepcopy(model).cuda(), base), inputs, amp, "cuda")
        assert far(found[0], exact[0]) < bound and far(found[1], exact[1]) < 2 * bound


@pytest.mark.parametrize("amp", BOUNDS, ids=["fp32", "bf16", "fp16"])
def test_the_students_lstm_is_that_of_the_cpu(amp):
    model = small_model("student").train()
    inputs = inputs_of("student", model)
    exact = step(copy.deepcopy(model).double(), inputs, None, "cpu")
    found = step(copy.deepcopy(model).cuda(), inputs, amp, "cuda")
    assert far(found[0], exact[0]) < BOUNDS[amp] and far(found[1], exact[1]) < 2 * BOUNDS[amp]


def trainer_of(folder, task: str, amp: str = "bf16") -> Trainer:
    config = Config(task=task, batch_size=32, lora_dropout=0.05, subset=0.25, amp=amp, num_answers=20)
    task = build_task(config, torch.device("cuda", 0))
    return Trainer(task, TrainOptions(epochs=2, amp=amp, log_interval=1000), folder, "cuda:0")


@pytest.mark.parametrize("task", ["classify", "choice", "vqa"])
def test_torch_sees_one_wait_per_step(task, tmp_path):
    trainer = trainer_of(tmp_path, task)
    steps = trainer.steps_of(0)[:4]
    feed = Feed(trainer.task.train_loader(0, [batch for s in steps for batch in s.batches]), trainer.device)
    trainer.model.train()
    trainer.train_step(steps[0], feed)  # makes what is made once
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for one in steps[1:3]:
                trainer.train_step(one, feed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
    assert len(waits) <= 2, waits


def interrupt(trainer: Trainer, after: int) -> None:
    """As SIGTERM would, in the middle of an epoch."""
    log = trainer.progress.step

    def step(state, total):
        log(state, total)
        if state.step == after:
            trainer.signals.signum = signal.SIGTERM

    trainer.progress.step = step


@pytest.mark.parametrize("amp", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("task", ["classify", "choice"])
def test_with_deterministic_a_resumed_run_ends_with_the_same_bits(task, amp, tmp_path):
    set_deterministic(True)
    try:
        whole = trainer_of(tmp_path / "whole", task, amp).fit()
        stopped = trainer_of(tmp_path / "stopped", task, amp)
        interrupt(stopped, after=7)
        with pytest.raises(Interrupted):
            stopped.fit()
        resumed = trainer_of(tmp_path / "stopped", task, amp).fit()
    finally:
        set_deterministic(False)
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def test_a_lone_rank_on_nccl_ends_with_the_bits_of_a_process_without_a_group(tmp_path):
    """What one card can show of NCCL: the group, sums in float64, gathered objects, the averaged gradients."""
    set_deterministic(True)
    try:
        alone = trainer_of(tmp_path / "alone", "classify").fit()
        meeting = f"file://{tmp_path / 'meeting'}"
        dist.init_process_group("nccl", meeting, rank=0, world_size=1, device_id=torch.device("cuda", 0))
        joined = trainer_of(tmp_path / "joined", "classify").fit()
    finally:
        set_deterministic(False)
        if dist.is_initialized():
            dist.destroy_process_group()
    assert joined["weights_sha256"] == alone["weights_sha256"]
