"""train.py stopped after step k and started again ends with the bits of a run that was not stopped, in every task.

Each case stops at every step of a short run, moves the run directory, and goes on in it.
"""

import json
import shutil

import pytest

from minilora.errors import UserError
from minilora.signals import Interrupted
from minilora.training.state import changed_data
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


@pytest.mark.parametrize(
    "change, said",
    [
        ("add", "train 15 -> 16 rows)"),
        ("remove", "train 15 -> 14 rows)"),
        ("rename", "train 15 -> 15 rows)"),
        ("val", "val 6 -> 7 rows)"),
        (None, None),
    ],
)
def test_pictures_changed_before_a_resume_are_reported(tasks, change, said, tmp_path, monkeypatch, capsys):
    words = [*tasks["classify"], "--epochs", "2", "--output", tmp_path / "run"]
    data = shutil.copytree(words[words.index("--data-dir") + 1], tmp_path / "photos")
    words[words.index("--data-dir") + 1] = data
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Interrupted):
            run_quickly(words, patch)
    first = sorted((data / "train" / "class_0").iterdir())[0]
    if change in ("add", "val"):
        shutil.copy(first, data / {"add": "train", "val": "val"}[change] / "class_1" / "new.png")
    elif change:
        first.rename(first.with_name("z.png")) if change == "rename" else first.unlink()
    capsys.readouterr()
    run_quickly(["--resume", tmp_path / "run"], monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if "added, removed or renamed" in line]
    assert [said in line for line in lines] == [True] * (change is not None)


def test_questions_changed_before_a_resume_are_reported_and_other_classes_refused(tasks, tmp_path, monkeypatch, capsys):
    for task in TASKS:
        words = [*tasks[task], "--epochs", "2", "--output", tmp_path / task]
        data = shutil.copytree(words[words.index("--data-dir") + 1], tmp_path / f"data-{task}")
        words[words.index("--data-dir") + 1] = data
        with monkeypatch.context() as patch:
            stop_after(2, patch)
            with pytest.raises(Interrupted):
                run_quickly(words, patch)
        if task == "classify":
            for part in ("train", "val"):
                (data / part / "class_2").rename(data / part / "other")
            with pytest.raises(UserError, match="other classes than the data that"):
                run_quickly(["--resume", tmp_path / task], monkeypatch)
            continue
        capsys.readouterr()
        file = data / "train.csv" if task == "choice" else data / "train_questions.json"
        if task == "choice":
            file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
        else:
            for name in ("questions", "annotations"):
                content = json.loads((data / f"train_{name}.json").read_text())
                content[name] = content[name][:-1]
                (data / f"train_{name}.json").write_text(json.dumps(content))
        run_quickly(["--resume", tmp_path / task], monkeypatch)
        assert "added, removed or renamed since then (train " in capsys.readouterr().out


def test_a_checkpoint_that_does_not_list_its_data_resumes_without_a_word():
    assert changed_data(None, {"train": {"rows": 3}}) is None
    assert "(train 0 -> 3 rows)" in changed_data({"train": "damaged"}, {"train": {"rows": 3}})
