"""--compile: each LoRA step is one graph with the values of the eager one; without a compiler one line says so."""

import pytest
import torch

from minilora.errors import RunError
from minilora.training.trainer import Trainer, TrainOptions
from tests.support.cli_data import QUICK, program
from tests.support.lora_steps import Step, gradients
from tests.support.toy_task import ToyTask


def compiled_gradients(name: str, backend: str) -> dict[str, torch.Tensor]:
    torch._dynamo.reset()
    step = Step(name)
    for tower in step.towers():
        tower.compile(fullgraph=True, backend=backend)  # a graph break would be an error
    return gradients(step)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", ["vit", "bert", "clip"])
def test_the_lora_step_is_one_graph_with_the_loss_and_gradients_of_eager(name):
    assert_same(compiled_gradients(name, "aot_eager"), gradients(Step(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "bert", "clip"])
def test_inductors_code_gives_the_loss_and_gradients_of_eager(name):
    assert_same(compiled_gradients(name, "inductor"), gradients(Step(name)))


@pytest.mark.slow
def test_train_py_compiles_and_trains(tmp_path):
    torch._dynamo.reset()
    words = [*QUICK, "--compile", "--max-steps", "2", "--subset", "16", "--output", str(tmp_path / "run")]
    assert program("train").main(words) == 0
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_without_a_cpp_compiler_one_line_says_what_to_do(tmp_path, monkeypatch):
    from torch._inductor import config

    torch._dynamo.reset()
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    options = TrainOptions(epochs=1, compile=True, log_interval=0)
    with pytest.raises(RunError, match="--compile") as told:
        Trainer(ToyTask(dropout=0.0), options, tmp_path, "cpu").fit()
    assert len(str(told.value).splitlines()) == 1 and "g++" in str(told.value)
