"""What a task offers to the Trainer and to train.py, and the part of it that all three share."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora import ticker
from minilora.atomic import write_json
from minilora.data.unlabelled import mixed_batches, mixed_counts
from minilora.settings.flags import Config
from minilora.tasks.precision import choose_amp
from minilora.tasks.predictor import Predictor
from minilora.tasks.teacher import Teacher
from minilora.training.device import autocast
from minilora.training.distributed import gathered
from reference_models.files.preprocess import describe_pictures
from reference_models.text.tokenizers import Tokenizer


class Task(ABC):
    """Data in parts (train, val, test), a model ready to train, and a Predictor. A task of its own
    adds the abstract methods. Batches are dictionaries, mostly of tensors.

    config has everything filled in that the user left open; base is {"weights": ..., "sha256": ...}
    for config.toml; metric is the key of evaluate()'s result that chooses the best epoch, where
    only a loss falls; workers are processes that read pictures.
    """

    unit = "pictures"  # what a row is, in the plural
    # with --teacher, what `loss` asks for its share: teacher.added(loss, logits, batch, counted)
    teacher: Teacher | None = None
    tokenizer: Tokenizer | None = None
    labels: list[str]  # classes or answers
    keys: list[str]  # of the labels, as the data spell them
    best: dict = {}  # in the test: what `evaluate` said of the best epoch
    data: dict  # {"train": data set, ...}
    unlabelled = 0  # rows of the training data, the last ones, that only the teacher answers

    def __init__(self, config: Config, model: nn.Module, record: dict, splits: Any, predictor: Predictor):
        self.config, self.model, self.base, self.splits, self.predictor = config, model, record, splits, predictor
        self.mode, self.preprocess, self.device = config.mode, model.preprocess, predictor.device
        self.workers = choose_workers(config, self.device) if config.data_dir else config.workers or 0
        self.amp = choose_amp(config, self.device)
        self.metric = config.metric or ("map" if config.multi_label else "accuracy")

    @abstractmethod
    def train_batches(self, epoch: int, times: int = 1) -> list[list[int]]:
        """The whole epoch as batches of `times` * batch_size item numbers, a function of (seed,
        epoch, size) alone."""

    @abstractmethod
    def loader(self, part: str, batches: Sequence[Sequence[int]], epoch: int | None = None) -> Iterable[dict]:
        """The collated batches of a part, in this order, augmented for `epoch` if one is given; or
        features in their inputs' place."""

    @abstractmethod
    def eval_batches(self, part: str) -> list[list[int]]:
        """Every row of a part once."""

    @abstractmethod
    def scores(self, found: NamedTuple, part: str) -> dict[str, float]:
        """{"loss", "accuracy", ...} of the predictions for a part."""

    @abstractmethod
    def file_of(self, row: int, part: str = "train") -> str:
        """The file of a row, for messages and `listing`."""

    @abstractmethod
    def data_lines(self) -> list[str]:
        """How much data there is, for the start of the run and for --dry-run."""

    def answered(self, part: str) -> bool:
        """Whether a part has answers to compare with."""
        return True

    def rows(self) -> dict[str, int]:
        """{part: how many rows}; training rows without a label, if there are any, stand apart."""
        rows, more = {part: len(data) for part, data in self.data.items()}, self.unlabelled
        return rows | ({"train": rows["train"] - more, "unlabelled": more} if more else {})

    def mixed(self, cut: Callable[[int], list[list[int]]], size: int, epoch: int) -> list[list[int]]:
        """An epoch of batches of both kinds; cut(u): the unlabelled rows in batches of u."""
        config, rows = self.config, self.rows()
        counts = mixed_counts(size, config.unlabelled_share)
        return mixed_batches(cut, rows["train"], rows["unlabelled"], counts, config.seed, epoch)

    def train_loader(self, epoch: int, batches: list[list[int]]) -> Iterable[dict]:
        """The training batches of an epoch."""
        return self.loader("train", batches, epoch)

    def loss(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean loss over the rows that count, {"correct": right answers, "count": answers})."""
        logits = self.predictor.logits(model, batch).float()  # (B, K)
        total, correct, counts = self.predictor.loss(logits, batch, self.config.smoothing)
        count = counts.sum()
        mean = total / count.clamp(min=1)
        if self.teacher:
            mean = self.teacher.added(mean, logits, batch, counts)
        return mean, {"correct": correct, "count": count}

    def predictions(self, model: nn.Module, part: str) -> NamedTuple:
        """The model's answers to every row of a part; several processes share the work."""

        def answer(mine: list[list[int]]) -> NamedTuple:
            batches = ticker.through(self.loader(part, mine), f"{part}, batches", len(mine))
            return self.predictor.predict(model, batches)

        return self.predictor.kind(*gathered(self.eval_batches(part), answer))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """{"loss": ..., metric: ...} on the validation data, with `model` in eval mode."""
        return self.scores(self.predictions(model, "val"), "val")

    def test(self, model: nn.Module, best: dict | None = None) -> dict[str, float] | None:
        """The same on the test data, or None; best: what `evaluate` said of the best epoch."""
        if "test" not in self.data or not self.answered("test"):
            return None
        self.best = best or {}
        with autocast(self.device, self.amp):
            scores = self.scores(self.predictions(model.eval(), "test"), "test")
        # NaN where no picture can be read
        return None if scores["accuracy"] != scores["accuracy"] else scores

    def zero_shot(self) -> dict[str, float] | None:
        """{"accuracy", "test_accuracy"} of a model that answers before any training; else None."""
        return None

    def describe(self, batch: dict) -> str:
        """The files in the batch, for messages."""
        files = list(dict.fromkeys(self.file_of(row) for row in batch["index"].tolist()))
        return ", ".join(files[:8]) + f" and {len(files) - 8} more" * (len(files) > 8)

    def picture_lines(self) -> list[str]:
        """How pictures are brought to the model's size."""
        return [f"pictures: {describe_pictures(self.preprocess)}"]

    def listing(self) -> dict[str, dict]:
        """{part: {"rows": how many, "sha256": of their files in order}}, for checkpoints: a resumed
        run says where the data are others."""
        found = {}
        for part, data in self.data.items():
            files = "\n".join(self.file_of(row, part) for row in range(len(data)))
            found[part] = {"rows": len(data), "sha256": hashlib.sha256(files.encode(errors="replace")).hexdigest()}
        return found

    def write_files(self, run_dir: Path) -> None:
        """labels.json, preprocess.json and whatever else load_run needs."""
        write_json(run_dir / "labels.json", {"labels": self.labels, "keys": self.keys})
        write_json(run_dir / "preprocess.json", self.preprocess)
        if self.tokenizer is not None:
            self.tokenizer.save(run_dir)
        if self.mode == "full":  # the run directory is then a checkpoint by itself
            write_json(run_dir / "config.json", {"minilora": asdict(self.model.config), "label_names": self.labels})


def choose_workers(config: Config, device: torch.device) -> int:
    """--workers; else none on a CPU, where the cores have enough to do; beside a GPU this process's
    share of the cores but for one, at most 16."""
    if config.workers is not None:
        return config.workers
    share = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes on this machine
    return 0 if device.type == "cpu" else min(16, max(1, share - 1))
