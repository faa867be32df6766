"""The bundled nano weights: small enough, what they say they are, and the command that makes them works."""

import json

import pytest
import torch

from minilora.commands.pretrain import RECIPES, WEIGHTS, Plan, accuracy, fit, main
from minilora.data.generated.shapes import ShapesSplit, task_classes
from minilora.data.pictures.transforms import Normalise
from reference_models import load_pretrained


def test_fit_lowers_the_loss_and_ends_in_eval_mode():
    model = torch.nn.Linear(4, 2)
    x = torch.randn(64, 4)

    def loss_of(numbers):
        return (model(x[list(numbers)]) - x[list(numbers), :2]).square().mean()

    before = loss_of(range(64)).item()
    fit(model, lambda numbers: loss_of([number % 64 for number in numbers]), Plan(steps=60, batch_size=16, lr=0.05))
    assert loss_of(range(64)).item() < 0.1 * before and not model.training


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_bundled_weights_are_at_most_four_megabytes_and_tell_their_origin(name):
    folder = WEIGHTS / RECIPES[name][2]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * 2**20
    record = json.loads((folder / "config.json").read_text())["pretraining"]
    assert {"task", "accuracy", "samples", "seconds", "seed"} <= set(record)


def test_vit_nano_knows_its_source_task():
    folder = WEIGHTS / RECIPES["vit-nano"][2]
    model = load_pretrained(folder).eval()
    assert model.labels == task_classes("source")
    score = accuracy(model, ShapesSplit("source", "val", 0, range(480)), Normalise(model.preprocess))
    assert abs(score - json.loads((folder / "config.json").read_text())["pretraining"]["accuracy"]) < 2


def test_the_command_writes_a_model_that_loads(tmp_path, capsys):
    assert main(["vit-nano", "--steps", "2", "--output", str(tmp_path / "nano")]) == 0
    assert "step 2/2" in capsys.readouterr().out
    assert load_pretrained(tmp_path / "nano").config.num_classes == 48
    assert json.loads((tmp_path / "nano" / "config.json").read_text())["pretraining"]["samples"] == 128
