"""Run directories that version 0.1.0 wrote (tests/fixtures/runs_0.1) are evaluated and resumed as they were then."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file

from tests.support.cli_data import ROOT
from tests.support.tiny_tasks import evaluate, run_quickly

RUNS = ROOT / "tests/fixtures/runs_0.1"
TASKS = ("classify", "vqa", "choice")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_a_finished_run_has_the_scores_that_were_printed_then(task, capsys):
    """The words to the letter; the numbers to 2 % of the scale, as another processor may turn a few answers."""
    then = (RUNS / task / "evaluated.txt").read_text().partition("\n")[2].rstrip()
    assert evaluate.main([str(RUNS / task)]) == 0
    now = capsys.readouterr().out.partition("\n")[2].rstrip()
    assert re.sub(r"\s+", " ", NUMBER.sub("#", now)) == re.sub(r"\s+", " ", NUMBER.sub("#", then))
    pairs = [(float(a), float(b)) for a, b in zip(NUMBER.findall(now), NUMBER.findall(then), strict=True)]
    assert len(pairs) >= 10
    for found, wanted in pairs:
        assert found == pytest.approx(wanted, abs=0.02 if wanted < 2 else 2, rel=0)


@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_resumes_to_the_end_of_the_one_that_was_not_stopped(task, tmp_path, monkeypatch):
    """Weights, losses and scores of every epoch; processors round differently, by less than 1e-6 here."""
    run = shutil.copytree(RUNS / f"{task}-stopped", tmp_path / "run")
    run_quickly(["--resume", run], monkeypatch)
    assert "step-9: epoch" in (run / "train.log").read_text()
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (run, RUNS / task))
    assert found.keys() == wanted.keys()
    assert max((found[name] - tensor).abs().max() for name, tensor in wanted.items()) < 1e-3
    assert len(rows(run)) == len(rows(RUNS / task)) == 3
    for now, then in zip(rows(run), rows(RUNS / task), strict=True):
        assert now.keys() == then.keys() and (now["epoch"], now["step"]) == (then["epoch"], then["step"])
        for name, most in (("train_loss", 1e-3), ("val_loss", 1e-3), ("accuracy", 0.02)):
            assert now[name] == pytest.approx(then[name], abs=most)
