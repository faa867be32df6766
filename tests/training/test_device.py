"""Where a run computes: the device, its precision, its workers, and the way of its batches."""

import os
from functools import partial

import pytest
import torch
from torch import nn

from minilora.errors import RunError, UserError
from minilora.settings.flags import Config
from minilora.tasks.precision import choose_amp
from minilora.tasks.task import choose_workers
from minilora.training.device import Feed, choose_device, set_deterministic, to_device
from minilora.training.faults import readable_errors
from minilora.training.state import load_optimizer_tensors, optimizer_tensors, portable
from tests.support.cli_data import QUICK, program
from tests.support.fake_cuda import CUDA, gpu

CPU = torch.device("cpu")


@pytest.mark.parametrize("native, amp", [(True, "bf16"), (False, "fp16")])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp16(monkeypatch, native, amp):
    def supported(including_emulation=True):
        return native or including_emulation  # what torch says of cards before compute capability 8.0

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_amp(Config(), CUDA) == amp


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("cuda:1") == torch.device("cuda", 1) == chosen[0]
    choose_device("cuda")
    assert len(chosen) == 1
    with pytest.raises(UserError, match="--device cuda:2"):
        choose_device("cuda:2")


@pytest.mark.parametrize("cores, processes, workers", [(64, 1, 16), (12, 1, 11), (12, 2, 5), (1, 1, 1)])
def test_beside_a_gpu_the_cores_of_this_process_read_pictures(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert choose_workers(Config(), CUDA) == workers
    assert choose_workers(Config(), CPU) == 0 and choose_workers(Config(workers=3), CUDA) == 3


def batches(events: list, n: int = 3):
    for k in range(n):
        events.append(f"read {k}")
        yield {"x": torch.full((2,), float(k)), "name": str(k)}


def test_on_a_cpu_a_batch_is_read_when_it_is_asked_for():
    events: list = []
    feed = Feed(batches(events), CPU)
    for k in range(3):
        batch, copy = next(feed)
        feed.ahead()
        assert len(events) == k + 1 and copy["x"] is batch["x"] and batch["name"] == str(k)
    with pytest.raises(StopIteration):
        next(feed)


def test_on_a_gpu_the_next_batch_is_read_and_copied_before_the_wait_for_this_one():
    with gpu() as watch:
        feed, copies = Feed(batches(watch.waits), CUDA), []
        for _ in range(3):
            copies.append(next(feed)[1])
            feed.ahead()
            (copies[-1]["x"] + 1).tolist()
        with pytest.raises(StopIteration):
            next(feed)
    assert watch.waits == ["read 0", "read 1", "tolist", "read 2", "tolist", "tolist"]
    assert [copy["name"] for copy in copies] == ["0", "1", "2"] and {copy["x"].device for copy in copies} == {CUDA}


def test_what_is_on_the_device_already_is_not_pinned():
    with gpu() as watch:
        there = torch.zeros(3, device=CUDA)
        assert to_device({"x": there}, CUDA)["x"] is there
    assert not watch.waits


def test_the_optimizers_memory_comes_back_in_the_order_of_its_parameter():
    def two_steps(stop: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        x, model = torch.randn(2, 3, 4, 4), nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for step in range(2):
            if step and stop:
                saved = {name: portable(tensor) for name, tensor in optimizer_tensors(model, optimizer).items()}
                load_optimizer_tensors(model, optimizer, saved)
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return model.state_dict()

    whole, resumed = two_steps(False), two_steps(True)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.fixture
def undone():
    yield
    set_deterministic(False)


def test_deterministic_is_asked_strictly_because_attention_only_warns_else(undone):
    torch.use_deterministic_algorithms(True, warn_only=True)  # a notebook's own wish before ours
    set_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_fixed_order_is_named_in_one_line(undone):
    set_deterministic(True)
    message = "cumsum_cuda_kernel does not have a deterministic implementation, but you set ..."
    with pytest.raises(RunError, match="--deterministic: cumsum_cuda_kernel does not .* on cuda") as error:
        with readable_errors(CUDA, 4, lambda: "epoch 1, step 1"):
            raise RuntimeError(message)
    assert "\n" not in str(error.value)


def test_deterministic_changes_no_bit_on_a_cpu(tmp_path, undone):
    main = partial(program("train").main)
    for name, more in (("a", []), ("b", ["--deterministic"])):
        words = [
            *QUICK,
            "--max-steps",
            "2",
            "--subset",
            "16",
            "--lora-dropout",
            "0.1",
            "--output",
            str(tmp_path / name),
        ]
        assert main([*words, *more]) == 0
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two
