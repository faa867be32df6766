"""train.py stopped after step k and started again ends with the bits of a run that was not stopped, in every task.

Each case stops at every step of a short run, moves the run directory, and goes on in it.
"""

import shutil

import pytest

from minilora.training.signals import Interrupted
from minilora.training.trainer import Trainer
from tests.support.tiny_tasks import bits, run_quickly, write_tasks

HARD = ["--augment", "basic", "--grad-accum-steps", "2", "--amp", "fp16", "--sched", "plateau", "--lora-dropout", "0.3"]
CASES = {
    "everything": [*HARD, "--epochs", "2", "--early-stop", "1", "--lr", "0.05", "--save-every", "2"],
    "plateau, early stop": [*HARD, "--epochs", "8", "--early-stop", "5", "--lr", "0.1"],
    "rand, clipping, dora": ["--augment", "rand", "--use-dora", "--clip-grad", "0.5", "--lora-dropout", "0.5",
                             "--sched", "linear", "--warmup-ratio", "0.3", "--epochs", "2", "--train-norms"],
    "full": ["--mode", "full", "--epochs", "2", "--amp", "bf16", "--augment", "basic", "--smoothing", "0.1"],
    "max steps, sgd": ["--max-steps", "4", "--opt", "sgd", "--train-bias", "all", "--epochs", "9"],
    "linear": ["--mode", "linear", "--epochs", "2", "--opt", "adam", "--augment", "rand"],
}  # fmt: skip
OWN = {"vqa": ["--soft-targets", "--group-by-image", "--fusion", "product"], "choice": ["--max-length", "20"]}
TASKS = ("classify", "vqa", "choice")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def stop_after(step, monkeypatch):
    """A SIGTERM during optimizer step `step`."""
    taken = Trainer.train_step

    def train_step(self, *args):
        stop = taken(self, *args)
        return stop or self.state.step + 1 == step

    monkeypatch.setattr(Trainer, "train_step", train_step)


def resumed_equals_whole(words, folder, monkeypatch, workers=("0", "0"), every=1):
    """Number of steps; `workers` of the first and of the second start."""
    first, second = ([*words, "--workers", count] for count in workers)
    run_quickly([*first, "--output", folder / "whole"], monkeypatch)
    whole = bits(folder / "whole")
    steps = int(whole["step"].removeprefix("step-"))
    for k in range(1, steps + 1, every):
        run = folder / f"run-{k}"
        with monkeypatch.context() as patch:
            stop_after(k, patch)
            with pytest.raises(Interrupted):
                run_quickly([*first, "--output", run], patch)
        moved = run.rename(folder / f"moved-{k}")
        words = ["--resume", moved] if k % 2 else [*second, "--output", moved]
        run_quickly(words, monkeypatch)
        found = bits(moved)
        if k == steps:  # what was stopped in the last step has its checkpoint already, from before the last validation
            found["values"] = whole["values"]
        assert found == whole, f"stopped after step {k}"
        assert f"step {k}" in (moved / "train.log").read_text()
        shutil.rmtree(moved)
    return steps


@pytest.mark.parametrize("task", TASKS)
def test_resume_at_every_step_is_bit_equal(tasks, task, tmp_path, monkeypatch):
    """Dropout, augmentation, accumulation, fp16's scaler, plateau schedule and early stopping together."""
    words = [*tasks[task], *CASES["everything"], *OWN.get(task, ())]
    assert resumed_equals_whole(words, tmp_path, monkeypatch) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("workers", [("0", "2"), ("2", "0")])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("task", TASKS)
def test_resume_in_other_settings_and_with_workers_is_bit_equal(tasks, task, case, workers, tmp_path, monkeypatch):
    words = [*tasks[task], *CASES[case]]
    if case in ("rand, clipping, dora", "linear"):
        words += OWN.get(task, ())
    assert resumed_equals_whole(words, tmp_path, monkeypatch, workers, every=2) >= 4
