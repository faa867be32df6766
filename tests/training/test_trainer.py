"""minilora/training/trainer.py: the arithmetic of the loop, bit-identical resume, NaN, fp16, early stopping."""

import json
import shutil
import time
import types

import pytest
import torch
from safetensors.torch import load_file

from minilora.errors import RunError, UserError
from minilora.signals import Interrupted
from minilora.training import checkpoint
from minilora.training.state import step_seed, tensors_sha256
from minilora.training.trainer import Trainer, TrainOptions
from tests.support.toy_task import ToyTask

CASES = {  # {task}, {options}: 14 items in batches of 4 are 4 steps per epoch, the last one ragged
    "plain": ({}, {}),
    "accumulation": ({}, {"grad_accum_steps": 2, "sched": "linear", "warmup_ratio": 0.3, "epochs": 3}),
    "fp16": ({}, {"amp": "fp16"}),
    "bf16 sgd": ({}, {"amp": "bf16", "opt": "sgd", "lr": 0.05}),
    "plateau and early stop": ({"batch_size": 7}, {"sched": "plateau", "early_stop": 4, "epochs": 8, "lr": 0.3}),
    "adam": ({"norm": False}, {"opt": "adam", "clip_grad": 0.0, "save_every": 3}),
    "max steps": ({}, {"max_steps": 6, "save_every": 1}),
    "skipped steps": ({"poison": (3,)}, {"nan_policy": "skip"}),
}


def train(folder, task_args=None, **options):
    task = ToyTask(**(task_args or {}))
    trainer = Trainer(task, TrainOptions(**{"epochs": 3, "log_interval": 0, **options}), folder, "cpu")
    return trainer, trainer.fit()


def without_times(history):
    clocks = ("seconds", "images_per_second", "peak_memory_mb")
    return [{k: v for k, v in row.items() if k not in clocks} for row in history]


def everything(trainer, result):
    """All bits that a resumed run must share with an uninterrupted one."""
    tensors, values = checkpoint.load_checkpoint(checkpoint.latest_checkpoint(trainer.run_dir))
    metrics = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "last": tensors_sha256({n: t for n, t in tensors.items() if not n.startswith("best.")}),
        "best": tensors_sha256(trainer.best_tensors),
        "result": tensors_sha256(load_file(trainer.run_dir / "model.safetensors")),
        "history": without_times(result["history"]),
        "metrics": without_times(metrics),
        "state": {k: v for k, v in vars(trainer.state).items() if k not in ("history", "best", "seconds")},
        "scaler": values["scaler"],
        "best epoch": result["best"]["epoch"],
    }


def interrupt_after(step, trainer):
    """Runs `trainer` until optimizer step `step` is done, as a SIGTERM during that step would end it."""
    taken = trainer.train_step

    def train_step(*args):
        stop = taken(*args)
        return stop or trainer.state.step + 1 == step

    trainer.train_step = train_step
    with pytest.raises(Interrupted):
        trainer.fit()


@pytest.mark.parametrize("case", CASES)
def test_resume_at_every_step_is_bit_equal(tmp_path, case):
    """And the run directory was moved in between; and the last step of an epoch may still wait for its score."""
    task_args, options = CASES[case]
    task_args, options = {"n": 14, **task_args}, {"epochs": 2, "log_interval": 0, **options}
    trainer, result = train(tmp_path / "whole", task_args, **options)
    whole = everything(trainer, result)
    if "plateau" in case:
        assert trainer.state.plateau.factor < 1.0 and trainer.state.epoch < 8, "the case must do what its name says"
    for k in range(1, result["steps"] + 1):
        folder = tmp_path / f"run-{k}"
        interrupt_after(k, Trainer(ToyTask(**task_args), TrainOptions(**options), folder, "cpu"))
        moved = folder.rename(tmp_path / f"moved-{k}")
        torch.manual_seed(k)  # the resumed process has other random numbers behind it
        assert everything(*train(moved, task_args, **options)) == whole, f"resumed after step {k}"
        shutil.rmtree(moved)


def test_resume_with_workers_is_bit_equal_to_none(tmp_path):
    whole = everything(*train(tmp_path / "whole", {"workers": 0}))
    for k in (2, 6, 9):
        folder = tmp_path / f"run-{k}"
        options = TrainOptions(epochs=3, log_interval=0)
        interrupt_after(k, Trainer(ToyTask(workers=2), options, folder, "cpu"))
        assert everything(*train(folder, {"workers": 2 if k == 6 else 0})) == whole


def late_after(steps, monkeypatch):
    """The clock of the trainer passes every time limit once it was asked after `steps` steps."""
    asked = iter([0.0] * steps)
    clock = types.SimpleNamespace(monotonic=lambda: next(asked, 1e9), perf_counter=time.perf_counter)
    monkeypatch.setattr("minilora.training.trainer.time", clock)


@pytest.mark.parametrize("step, scored", [(1, [1]), (3, [1]), (4, [1]), (6, [1]), (8, [1, 2]), (12, [1, 2, 3])])
def test_time_limit_ends_after_its_step_and_resumes_to_the_same_bits(tmp_path, monkeypatch, step, scored):
    """Steps 4, 8 and 12 end an epoch, which is scored; 1 and 3 cut the first, which is scored as it is."""
    whole = everything(*train(tmp_path / "whole", {"n": 14}))
    with monkeypatch.context() as patch:
        late_after(step, patch)  # the first question sets the deadline
        trainer, result = train(tmp_path / "run", {"n": 14}, time_limit=0.5)
    assert trainer.state.step == result["steps"] == step
    assert trainer.cut_short == (step < 12)
    assert [row["epoch"] for row in result["history"]] == scored
    assert result["best"] in result["history"]
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in trainer.best_tensors.items())
    assert everything(*train(tmp_path / "run", {"n": 14}, time_limit=60.0)) == whole


def test_equal_seeds_give_equal_bits_and_others_do_not(tmp_path):
    first, again, other = (train(tmp_path / str(i), seed=s)[1] for i, s in enumerate((0, 0, 1)))
    assert first["weights_sha256"] == again["weights_sha256"] != other["weights_sha256"]
    low_bits = {step_seed(s, t, r) & 0xFFFFFFFF for s in range(4) for t in range(200) for r in range(4)}
    assert len(low_bits) == 3200


@pytest.mark.parametrize("batch_size, accumulate", [(4, 2), (2, 4), (8, 1), (3, 3)])
def test_accumulation_equals_the_big_batch(tmp_path, batch_size, accumulate):
    """Also for the ragged end: 22 items are 2 x 8 + 6, or 2 x 9 + 4."""
    quiet = {"dropout": 0.0, "norm": False}
    big, _ = train(tmp_path / "big", {**quiet, "batch_size": batch_size * accumulate}, opt="sgd", lr=0.1)
    small, _ = train(
        tmp_path / "small", {**quiet, "batch_size": batch_size}, opt="sgd", lr=0.1, grad_accum_steps=accumulate
    )
    assert big.state.step == small.state.step
    for a, b in zip(big.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(big.state.history, small.state.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-6)
        assert a["train_accuracy"] == b["train_accuracy"]


def test_only_trainable_tensors_move_and_they_learn(tmp_path):
    before = {n: t.clone() for n, t in ToyTask().model.state_dict().items()}
    trainer, result = train(tmp_path / "run", {"n": 64, "batch_size": 8, "dropout": 0.0}, epochs=8, lr=3e-2)
    after = trainer.model.state_dict()
    moved = {n for n, t in before.items() if not torch.equal(t, after[n])}
    assert moved == {n for n in before if not n.startswith("frozen")}
    assert result["best"]["accuracy"] > 0.6
    assert result["history"][-1]["train_loss"] < 0.7 * result["history"][0]["train_loss"]


def test_best_epoch_is_kept_and_of_equals_the_first(tmp_path):
    scores = iter([0.5, 0.8, 0.8, 0.6])
    snapshots = []

    class Scripted(ToyTask):
        def evaluate(self, model):
            snapshots.append({n: t.clone() for n, t in model.state_dict().items()})
            return {"loss": 1.0, "accuracy": next(scores)}

    task = Scripted()
    result = Trainer(task, TrainOptions(epochs=4, log_interval=0), tmp_path, "cpu").fit()
    assert result["best"]["epoch"] == 2 and result["final"]["epoch"] == 4
    written = load_file(tmp_path / "model.safetensors")
    for name, tensor in snapshots[1].items():
        assert torch.equal(tensor, task.model.state_dict()[name]) and torch.equal(tensor, written[name])


def test_early_stopping_counts_epochs_without_a_better_one(tmp_path):
    class Falling(ToyTask):
        def evaluate(self, model):
            return {"loss": 1.0, "accuracy": [0.1, 0.9, 0.8, 0.7, 0.6, 0.5][self.losses // 6 - 1]}

    result = Trainer(Falling(), TrainOptions(epochs=6, early_stop=2, log_interval=0), tmp_path, "cpu").fit()
    assert [row["epoch"] for row in result["history"]] == [1, 2, 3, 4]


def test_a_finished_run_is_not_trained_again(tmp_path):
    _, first = train(tmp_path)
    task = ToyTask(after=lambda n: pytest.fail("trained again"))
    again = Trainer(task, TrainOptions(epochs=3, log_interval=0), tmp_path, "cpu").fit()
    assert again == first


def test_max_steps_ends_inside_an_epoch_and_is_scored(tmp_path):
    trainer, result = train(tmp_path, max_steps=8)
    assert result["steps"] == 8 and [row["step"] for row in result["history"]] == [6, 8]
    assert trainer.total_steps == 8


def test_nan_loss_stops_with_its_files_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(RunError) as caught:
        train(tmp_path, {"poison": (5,)}, save_every=1)
    message = str(caught.value)
    order = [i for batch in ToyTask().train_batches(0) for i in batch]
    step = order.index(5) // 4 + 1
    assert (
        f"epoch 1, step {step} (" in message
        and "the loss (soft) is not finite; batch: " in message
        and "item-5.jpg" in message
    )
    assert "item-" in message and len(message.splitlines()) == 1
    newest = checkpoint.latest_checkpoint(tmp_path)
    assert (newest is None) if step == 1 else newest.name == f"step-{step - 1}"
    assert not (tmp_path / "model.safetensors").exists()


def test_nan_loss_is_skipped_on_request_and_never_reaches_a_weight(tmp_path):
    trainer, result = train(tmp_path, {"poison": (5, 7)}, nan_policy="skip")
    assert 3 <= result["history"][-1]["skipped_steps"] <= 6
    assert all(t.isfinite().all() for t in load_file(tmp_path / "model.safetensors").values())
    assert all(row["train_loss"] is not None for row in result["history"])
    assert "skipped step " in (tmp_path / "train.log").read_text()


def test_nan_gradient_with_a_finite_loss_is_caught_too(tmp_path):
    class Cusp(ToyTask):
        def loss(self, model, batch):
            loss, stats = super().loss(model, batch)
            return loss + (model.head.bias * 0.0).abs().sum().sqrt(), stats  # d sqrt(0) is infinite, times 0 is NaN

    task = Cusp()
    with pytest.raises(
        RunError, match=r"step 1 \(no checkpoint yet\): the gradient of head.bias is not finite; batch: item-"
    ):
        Trainer(task, TrainOptions(epochs=1, log_interval=0), tmp_path, "cpu").fit()
    assert all(p.isfinite().all() for p in task.model.parameters())


def test_weights_that_overflow_are_not_written(tmp_path):
    """SGD with a rate of 1e38 makes them infinite in a step that had a finite gradient."""
    with pytest.raises(RunError, match="holds NaN or infinity; the checkpoint is not written"):
        train(tmp_path, opt="sgd", lr=3e38, weight_decay=100.0, clip_grad=0.0, nan_policy="skip")
    assert not (tmp_path / "model.safetensors").exists() and checkpoint.latest_checkpoint(tmp_path) is None


def test_fp16_overflow_is_skipped_and_counted(tmp_path):
    trainer = Trainer(ToyTask(), TrainOptions(epochs=3, amp="fp16", log_interval=0), tmp_path, "cpu")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    result = trainer.fit()
    overflows = result["history"][-1]["fp16_overflows"]
    assert 1 <= overflows < result["steps"]
    assert trainer.scaler.get_scale() == 2.0 ** (24 - overflows)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("opt", ["adamw", "adam", "sgd"])
def test_a_run_stopped_after_an_overflowing_first_step_ends_with_the_same_bits(opt, tmp_path):
    def fp16(folder):
        trainer = Trainer(ToyTask(), TrainOptions(epochs=2, opt=opt, amp="fp16", log_interval=0), folder, "cpu")
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        return trainer

    whole, stopped = fp16(tmp_path / "whole"), fp16(tmp_path / "stopped")
    expected = everything(whole, whole.fit())
    interrupt_after(1, stopped)
    assert stopped.state.overflows == 1 and stopped.scaler.get_scale() == 2.0**23
    resumed = fp16(tmp_path / "stopped")
    assert everything(resumed, resumed.fit()) == expected


def test_out_of_memory_is_one_line_that_says_what_to_try(tmp_path):
    def full(number):
        if number == 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(RunError) as caught:
        train(tmp_path, {"after": full})
    message = str(caught.value)
    assert (
        "step 9 (last checkpoint" in message
        and "batch size 4, peak" in message
        and "--batch-size 2 with --grad-accum-steps 2" in message
    )
    assert "step-6" in message and len(message.splitlines()) == 1
    assert checkpoint.latest_checkpoint(tmp_path).name == "step-6"


def test_compile_keeps_names_and_values(tmp_path):
    task = ToyTask(dropout=0.0)
    calls = []
    task.model.compile = lambda: calls.append("compiled")
    trainer = Trainer(task, TrainOptions(epochs=1, compile=True, log_interval=0), tmp_path, "cpu")
    trainer.fit()
    assert calls == ["compiled"]
    assert set(load_file(tmp_path / "model.safetensors")) == set(ToyTask().model.state_dict())


@pytest.mark.slow
def test_compiled_training_ends_near_the_eager_one(tmp_path):
    options = {"opt": "sgd", "lr": 0.1, "epochs": 2}
    eager, _ = train(tmp_path / "eager", {"dropout": 0.0}, **options)
    compiled, _ = train(tmp_path / "compiled", {"dropout": 0.0}, compile=True, **options)
    for (name, a), (other, b) in zip(eager.model.named_parameters(), compiled.model.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_log_lines_are_greppable(tmp_path, capsys):
    train(tmp_path, log_interval=2)
    line = capsys.readouterr().out.splitlines()[0]
    for word in ("epoch 1/3 step 2/18 loss ", " accuracy ", " lr ", " items/s ", " left 0:00:0", " peak ", " MiB"):
        assert word in line
    assert "\x1b" not in line and line in (tmp_path / "train.log").read_text()
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = "epoch step lr train_loss val_loss accuracy seconds images_per_second peak_memory_mb".split()
    assert len(rows) == 3 and all(set(names) <= set(row) for row in rows)


@pytest.mark.slow
def test_2000_steps_have_constant_memory_and_step_time(tmp_path):
    marks = []

    def after(number):
        if number % 500 == 0:
            with open("/proc/self/statm") as file:
                marks.append((time.process_time(), int(file.read().split()[1]) * 4096 / 2**20))

    train(tmp_path, {"n": 400, "after": after}, epochs=20, grad_accum_steps=1, save_every=100)
    seconds = [b[0] - a[0] for a, b in zip(marks, marks[1:], strict=False)]
    assert len(marks) == 4 and max(seconds) < 2 * min(seconds), seconds
    assert marks[-1][1] - marks[0][1] < 8, marks


def test_an_empty_training_set_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="empty"):
        Trainer(ToyTask(n=0), TrainOptions(), tmp_path, "cpu")


def test_resume_never_starts_over_and_resume_dir_goes_on_elsewhere(tmp_path):
    options = TrainOptions(epochs=3, log_interval=0)
    interrupt_after(4, Trainer(ToyTask(), options, tmp_path / "a", "cpu"))
    whole = everything(*train(tmp_path / "whole"))
    assert everything(*train(tmp_path / "b", resume=str(tmp_path / "a"))) == whole
    assert everything(*train(tmp_path / "c", resume=str(tmp_path / "a" / "checkpoints" / "step-4"))) == whole
    trainer, result = train(tmp_path / "a", resume="never")
    assert everything(trainer, result) == whole and "resumed" not in (tmp_path / "a" / "train.log").read_text()
    with pytest.raises(UserError, match="no valid checkpoint"):
        train(tmp_path / "d", resume=str(tmp_path / "nowhere"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path, {"norm": False})
    with pytest.raises(UserError, match="missing norm.weight.*--resume never"):
        train(tmp_path, {"norm": True})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_last_batch_of_one_joins_the_one_before_where_batchnorm_moves(tmp_path, accumulate, capsys):
    """13 items in batches of 4 (12 items a step): the bits of one run, of one resumed at every step, and a line."""
    task = {"n": 13, "batch_size": 4}
    trainer, result = train(tmp_path / "whole", task, epochs=2, grad_accum_steps=accumulate, log_interval=0)
    assert result["steps"] == (6 if accumulate == 1 else 2)
    assert capsys.readouterr().out.count("a batch of one joins the batch before it") == 1
    for k in range(1, result["steps"]):
        run = tmp_path / f"at-{k}"
        options = TrainOptions(**{"epochs": 2, "grad_accum_steps": accumulate, "log_interval": 0, "amp": "fp32"})
        stopped = Trainer(ToyTask(**task), options, run, "cpu")
        interrupt_after(k, stopped)
        _, again = train(run, task, epochs=2, grad_accum_steps=accumulate, log_interval=0)
        assert again["weights_sha256"] == result["weights_sha256"], k
    capsys.readouterr()
    _, plain = train(tmp_path / "plain", task | {"norm": False}, epochs=2, grad_accum_steps=accumulate, log_interval=0)
    assert plain["steps"] == (8 if accumulate == 1 else 4) and "joins" not in capsys.readouterr().out


def test_a_single_item_for_batchnorm_is_a_sentence(tmp_path):
    with pytest.raises(RunError, match="BatchNorm needs two items in a batch at least; try --batch-size 2"):
        train(tmp_path, {"n": 5, "batch_size": 1}, epochs=1)


def test_a_frozen_batchnorm_of_ours_needs_no_second_item():
    from minilora.training.faults import least_items
    from reference_models.mobilenet import BatchNorm

    assert least_items(torch.nn.Sequential(BatchNorm(3))) == 2
    assert least_items(torch.nn.Sequential(BatchNorm(3).requires_grad_(False))) == 1
    assert least_items(torch.nn.Sequential(torch.nn.BatchNorm2d(3).requires_grad_(False))) == 2
    assert least_items(torch.nn.Linear(3, 3)) == 1


def test_an_epoch_of_which_nothing_counts_says_so(tmp_path):
    task = ToyTask()
    loss = task.loss
    task.loss = lambda model, batch: (lambda mean, stats: (mean * 0, stats | {"count": 0}))(*loss(model, batch))
    with pytest.raises(UserError, match="epoch 1: none of 22 items counts: no picture can be read"):
        Trainer(task, TrainOptions(epochs=1), tmp_path, "cpu").fit()


def test_killed_while_it_validates_a_run_goes_on_after_the_epoch(tmp_path):
    """--save-every 0: the checkpoint of the epoch's end is written before its validation, and once more after it."""
    whole = train(tmp_path / "whole", epochs=2, log_interval=0)[1]

    class Killed(Exception):
        pass

    for epoch in (1, 2):
        task, seen = ToyTask(), []

        def evaluate(model, task=task, seen=seen, epoch=epoch, evaluate=ToyTask.evaluate):
            seen.append(1)
            if len(seen) == epoch:
                raise Killed
            return evaluate(task, model)

        task.evaluate = evaluate
        run = tmp_path / f"killed-{epoch}"
        trainer = Trainer(task, TrainOptions(epochs=2, log_interval=0), run, "cpu")
        with pytest.raises(Killed):
            trainer.fit()
        newest = checkpoint.latest_checkpoint(run)
        assert newest.name == f"step-{6 * epoch}"
        assert checkpoint.load_checkpoint(newest)[1]["position"] == 22
        trainer, again = train(run, epochs=2, log_interval=0)
        assert again["weights_sha256"] == whole["weights_sha256"]
        assert without_times(again["history"]) == without_times(whole["history"])
        assert checkpoint.load_checkpoint(checkpoint.latest_checkpoint(run))[1]["position"] == 0
