"""--compile: each LoRA step is one graph with the values of the eager one; without a compiler one line says so."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from minilora import LoRAConfig, inject_lora
from minilora.errors import RunError
from minilora.tasks.choice.task import ChoicePredictor
from minilora.training.trainer import Trainer, TrainOptions, compile_blocks
from reference_models.load import FAMILIES
from tests.support.cli_data import QUICK, program
from tests.support.families import inputs_of, small_model
from tests.support.lora_steps import Step, gradients
from tests.support.toy_task import ToyTask

LORA = [family for family in FAMILIES if family not in ("mobilenet", "student")]  # an LSTM breaks every graph


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


def breaks(family: str, amp: str | None, **method) -> list[str]:
    """Why torch.compile would leave its graph in the forward pass of a LoRA model."""
    torch._dynamo.reset()
    model = small_model(family)
    if family in LORA:
        inject_lora(model, LoRAConfig(r=4, **method))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp is not None):
        found = torch._dynamo.explain(model.train())(*inputs_of(family, model))
    assert found.graph_count == 1 + found.graph_break_count
    return [reason.reason for reason in found.break_reasons]


@pytest.mark.parametrize("family, method", [
    ("vit", {"lora_dropout": 0.1}), ("vit", {"use_dora": True}), ("bert", {"lora_dropout": 0.1}),
])  # fmt: skip
def test_no_graph_break_under_autocast(family, method):
    assert not breaks(family, "bf16", **method)


@pytest.mark.slow
@pytest.mark.parametrize("amp", [None, "bf16"])
@pytest.mark.parametrize("method", [{}, {"lora_dropout": 0.1}, {"use_dora": True}], ids=["lora", "dropout", "dora"])
@pytest.mark.parametrize("family", LORA)
def test_no_graph_break_in_a_lora_model_of_any_family(family, method, amp):
    assert not breaks(family, amp, **method)


@pytest.fixture
def eagerly(monkeypatch):
    """Blocks are compiled into one graph each, which runs without a C++ compiler; a graph break is an error."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("name", ["vit", "bert", pytest.param("clip", marks=pytest.mark.slow)])
def test_a_model_compiled_block_by_block_has_the_loss_and_gradients_of_eager(name, eagerly):
    step = Step(name)
    compile_blocks(step.model)
    assert_same(gradients(step), gradients(Step(name)))


def test_blocks_of_one_shape_share_their_compilation(eagerly):
    model = small_model("vit", depth=8)
    inject_lora(model, LoRAConfig(r=4, lora_dropout=0.1))
    compile_blocks(model)
    for _ in range(2):
        model(*inputs_of("vit", model)).sum().backward()
    assert counters["stats"]["unique_graphs"] <= 3  # the first block, those in the middle, the last one


@pytest.mark.slow
def test_towers_batches_and_lengths_of_many_kinds_stay_compiled(eagerly):
    """torch goes back to eager mode after 8 compilations of one code, of which two towers have more."""
    step = Step("clip")
    compile_blocks(step.model)
    for length, rows, trained in (
        (10, 8, True),
        (9, 8, True),
        (8, 5, True),
        (10, 8, False),
        (7, 8, False),
        (9, 3, False),
    ):
        ids = step.batch["input_ids"][:rows, :, -length:]
        batch = {"image": step.images[:rows], "picture": torch.arange(rows), "input_ids": ids, "share": length < 10}
        batch["attention_mask"] = torch.ones_like(ids)
        with torch.set_grad_enabled(trained):
            ChoicePredictor().logits(step.model.train(trained), batch).sum()
    assert counters["stats"]["unique_graphs"] > 8


def test_a_model_without_blocks_is_compiled_whole(eagerly):
    class Model(nn.Sequential):  # before torch 2.14 a container of torch's own is not compiled
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](self[0](x))

    model = Model(nn.Linear(3, 4), nn.ReLU())
    compile_blocks(model)
    model(torch.randn(2, 3)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


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
def test_without_a_cpp_compiler_one_line_says_what_to_do(tmp_path):
    from torch._inductor import config

    torch._dynamo.reset()
    options = TrainOptions(epochs=1, compile=True, log_interval=0)
    absent = config.patch({"cpp.cxx": ("no-such-compiler",)})  # and back, which setattr cannot do
    with absent, pytest.raises(RunError, match="--compile") as told:
        Trainer(ToyTask(dropout=0.0), options, tmp_path, "cpu").fit()
    assert len(str(told.value).splitlines()) == 1 and "g++" in str(told.value)
