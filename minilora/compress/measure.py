"""What compression is measured by: bytes of the weights, stored and zipped, and forward time."""

import math
import statistics
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import nn


class Size(NamedTuple):
    """Parameters, those that are not zero, bytes of the safetensors file as it is and deflated."""

    parameters: int
    nonzero: int
    stored: int
    zipped: int


def model_size(model: nn.Module) -> Size:
    """The size of a model, every tensor of its state dictionary stored."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    content = save(tensors, metadata={"format": "pt"})
    return Size(
        sum(p.numel() for p in parameters),
        sum(int(torch.count_nonzero(p)) for p in parameters),
        len(content),
        len(zlib.compress(content, 6)),  # the level of zip and of Python's zipfile
    )


def median_seconds(
    calls: dict[Any, Callable[[], object]], rounds: int = 9, device: str = "cpu", at_least: float = 0.02
) -> dict[Any, float]:
    """Median seconds of each call, after two to warm up. The calls take turns, so that a busy
    minute of the machine hits all; short ones are averaged over `at_least` seconds."""
    repeats = {name: max(1, math.ceil(at_least / _seconds(call, 2, device))) for name, call in calls.items()}
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_seconds(call, repeats[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds of one call, the mean of `repeats`."""
    start = _now(device)
    for _ in range(repeats):
        call()
    return max(_now(device) - start, 1e-9) / repeats


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()
