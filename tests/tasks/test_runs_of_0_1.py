"""Run directories that version 0.1.0 wrote (tests/fixtures/runs_0.1) are evaluated and resumed as they were then."""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.support.cli_data import ROOT
from tests.support.tiny_tasks import evaluate, run_quickly

RUNS = ROOT / "tests/fixtures/runs_0.1"
TASKS = ("classify", "vqa", "choice")
DRAWN_THEN = [0, 0, 2, 0, 0, 0, 2, 2]
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")


def drawn_now() -> list[float]:
    torch.manual_seed(0)
    return F.dropout(torch.ones(8)).tolist()


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_a_finished_run_has_the_scores_that_were_printed_then(task, capsys):
    """In percent now; to 2 points, as another processor may turn a few answers."""
    then = (RUNS / task / "evaluated.txt").read_text().partition("\n")[2]
    assert evaluate.main([str(RUNS / task), "--device", "cpu"]) == 0
    now = [float(number) for number in NUMBER.findall(capsys.readouterr().out.partition("\n")[2])]
    wanted = [float(number) * (100 if re.fullmatch(r"0\.\d{4}", number) else 1) for number in NUMBER.findall(then)]
    wanted = [number for number in wanted if number not in (0, 100)]
    assert len(wanted) >= 10
    for number in wanted:
        assert min(abs(number - found) for found in now) <= 2, number


@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_resumes_to_the_end_of_the_one_that_was_not_stopped(task, tmp_path, monkeypatch):
    """Weights, losses and scores of every epoch; processors round differently, by less than 1e-6 here."""
    if task == "vqa" and drawn_now() != DRAWN_THEN:
        pytest.skip("this torch draws other dropout than the one that wrote these runs")
    run = shutil.copytree(RUNS / f"{task}-stopped", tmp_path / "run")
    run_quickly(["--resume", run, "--device", "cpu"], monkeypatch)  # a GPU draws other dropout
    assert "step-9: epoch" in (run / "train.log").read_text()
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (run, RUNS / task))
    assert found.keys() == wanted.keys()
    assert max((found[name] - tensor).abs().max() for name, tensor in wanted.items()) < 1e-3
    assert len(rows(run)) == len(rows(RUNS / task)) == 3
    for now, then in zip(rows(run), rows(RUNS / task), strict=True):
        assert now.keys() == then.keys() and (now["epoch"], now["step"]) == (then["epoch"], then["step"])
        for name, most in (("train_loss", 1e-3), ("val_loss", 1e-3), ("accuracy", 0.02)):
            assert now[name] == pytest.approx(then[name], abs=most)
