"""A finished run, opened again: model, labels and preprocessing from the run directory and the base
weights it names.

run = load_run("runs/classify-lora-000")
run.predict(["dog.jpg"])        # [[("beagle", 0.93), ("Border_terrier", 0.04), ...]]
"""

import contextlib
import io
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from minilora.adapter import load_adapter
from minilora.errors import UserError
from minilora.report.samples import Example
from minilora.settings.flags import Config
from minilora.settings.parse import read_run_config
from minilora.tasks import base, run_module
from minilora.tasks.runfiles import check_weight_file, read_summary
from reference_models import load_pretrained

WEIGHT_FILES = {"full": "model.safetensors", "lora": "adapter_model.safetensors", "linear": "adapter_model.safetensors"}


@dataclass
class Evaluation:
    """A model's answers to one part of a data set.

    scores: {"accuracy", "precision", "recall", "f1", "loss"} as fractions, None where
    nothing has a label.
    text: what evaluate.py prints. header, rows: predictions.csv, one row per input in its order.
    submission: header and rows for a competition; results: {question_id: answer}, for VQA's.
    metrics, vqa, examples ...: what report.page.ReportData takes.
    """

    scores: dict[str, float] | None
    text: str
    header: list[str]
    rows: list[list]
    submission: tuple[list[str], list[list]]
    metrics: dict | None = None
    vqa: dict | None = None
    answer_histogram: Sequence[tuple[str, int]] = ()
    mistakes: Sequence[Example] = ()
    unsure: Sequence[Example] = ()
    examples: Sequence[Example] = ()
    samples: dict[str, list] = field(default_factory=dict)
    results: dict[int, str] | list[dict] | None = None


@dataclass
class Run:
    """What every task's run has. Each task's own class adds

    predict(...)                    top answers for pictures (and texts)
    evaluate(options) -> Evaluation options: the flags of evaluate.py
    batch(n, options) -> dict       the first n validation items, on the run's device
    logits(batch) -> Tensor         the model's answer to such a batch
    pictures(batch) -> Tensor       (n, 3, S, S), for attention maps
    """

    path: Path
    config: Config
    model: nn.Module
    base: dict[str, Any]
    preprocess: dict
    labels: list[str]
    keys: list[str]
    device: torch.device
    summary: dict

    @property
    def task(self) -> str:
        return self.config.task

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def weight_file(self) -> Path:
        return self.path / WEIGHT_FILES[self.config.mode]


def open_run(path: Path, device: str | torch.device = "cpu", weights: str | dict | None = None) -> Run:
    """The run in `path`; see load_run."""
    if not path.is_dir():
        raise UserError(
            f"{path}: " + ("is a file; name its run directory" if path.exists() else "no such run directory")
        )
    config, recorded = read_run_config(path)
    file = path / WEIGHT_FILES[config.mode]
    if not file.is_file():
        raise UserError(f"{path}: {file.name} is missing; the run has not finished an epoch yet")
    check_weight_file(file, read_summary(path))
    return run_module(config.task).load(path, config, recorded, torch.device(device), weights)


def restore_single(path: Path, config: Config, recorded: dict, weights: str | None, classes: int) -> nn.Module:
    """The trained model of a run with one encoder: base weights + adapter, or the
    run's own weights."""
    if config.mode == "full":
        return load_pretrained(path)
    model, found = restore_base(config, recorded, weights, classes)
    base.check_base(found, recorded, path)
    return load_adapter(model, path)


def restore_base(config: Config, recorded: dict, weights: str | None, classes: int | None) -> tuple[nn.Module, dict]:
    """The base model that the run started from, and the record of what was found."""
    source, model = weights or recorded.get("weights") or config.weights, base.one_value(config, "model")
    if isinstance(source, dict):
        raise UserError(
            f"--task {config.task} has one encoder, but its weights are named by tower: {source}; give one path"
        )
    name = source if "/" in model and not os.path.isdir(model) else model
    with restoring([source]):
        return base.load_base(name, source, config.seed, classes, config.image_size)


@contextlib.contextmanager
def restoring(sources: Iterable[str | None]):
    """For making a base model again: quiet ("a new head" is replaced at once), no random number
    taken from the program.

    Raises UserError where one of its weight files is gone.
    """
    for source in sources:
        known = source is None or source in (base.RANDOM, base.BUNDLED) or source.startswith("hf:")
        if not known and not os.path.exists(source):
            raise UserError(f"the base weights {source} are gone; say where they are now with --weights")
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        yield


def latency(run: Run, options: Any, sizes: Sequence[int] = (1, 32), rounds: int = 15) -> list[tuple[int, float]]:
    """(batch size, median seconds of one forward pass) after three passes to warm up."""
    result = []
    for size in sizes:
        batch, times = run.batch(size, options), []
        for number in range(rounds + 3):
            start = time.perf_counter()
            with torch.inference_mode():
                run.logits(batch)
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            times += [time.perf_counter() - start] if number >= 3 else []
        result.append((size, float(np.median(times))))
    return result
