"""--log-to tensorboard: every number of a run, read back from the event files by TensorBoard itself."""

import json

import pytest

from minilora.errors import UserError
from minilora.training import board
from minilora.training.trainer import Trainer, TrainOptions
from tests.support.cli_data import program
from tests.support.toy_task import ToyTask

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder):
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_steps_and_epochs_are_the_numbers_of_the_metrics_file(tmp_path):
    Trainer(ToyTask(n=12), TrainOptions(epochs=3, log_interval=1, log_to="tensorboard"), tmp_path, "cpu").fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = read(tmp_path)
    for name in ("train_loss", "val_loss", "accuracy", "lr"):
        points = [(event.step, event.value) for event in events.Scalars(f"epoch/{name}")]
        assert [step for step, _ in points] == [row["step"] for row in rows]
        assert [value for _, value in points] == pytest.approx([row[name] for row in rows], rel=1e-6)
    losses = [event.value for event in events.Scalars("step/loss")]
    assert [event.step for event in events.Scalars("step/loss")] == list(range(1, rows[-1]["step"] + 1))
    per_epoch = len(losses) // 3
    first = losses[:per_epoch]
    assert min(first) <= rows[0]["train_loss"] <= max(first)


def test_without_the_flag_nothing_is_written(tmp_path):
    Trainer(ToyTask(n=8), TrainOptions(epochs=1), tmp_path, "cpu").fit()
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_shows_each_step_once(tmp_path):
    options = {"log_interval": 1, "log_to": "tensorboard"}
    Trainer(ToyTask(n=12), TrainOptions(epochs=3, max_steps=2, **options), tmp_path, "cpu").fit()
    Trainer(ToyTask(n=12), TrainOptions(epochs=3, **options), tmp_path, "cpu").fit()
    steps = [event.step for event in read(tmp_path).Scalars("step/loss")]
    assert steps == sorted(set(steps)) and steps[0] == 1


def test_without_the_package_one_line_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--log-to tensorboard needs the package tensorboard: pip install"):
        board.check_available()


def test_version_is_printed_by_both_programs(capsys):
    for name in ("train", "evaluate"):
        with pytest.raises(SystemExit) as exit_:
            program(name).main(["--version"])
        assert exit_.value.code == 0 and capsys.readouterr().out == "minilora 0.2.0\n"
