"""What classification and multiple choice share: every row has one label, and the answer
is a distribution.

loss = - sum_k t_k log softmax(logits)_k   with t = (1 - smoothing) * one-hot + smoothing / K
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.data.pictures.loader import epoch_order, in_order, train_keys
from minilora.settings.flags import Config
from minilora.tasks import base
from minilora.tasks.teacher import Teacher
from minilora.training import distributed


@dataclass
class Predictions:
    """What a model says of N rows: probabilities (N, K) float32, labels (N,) int64 (-1
    unknown), valid (N,)."""

    probabilities: np.ndarray
    labels: np.ndarray
    valid: np.ndarray

    @property
    def scored(self) -> np.ndarray:
        """(N,) bool: rows with a readable picture and a known label."""
        return self.valid & (self.labels >= 0)

    def scores(self) -> dict[str, float]:
        """{"loss", "accuracy"} over the scored rows; loss is the mean of -log p(truth)."""
        rows = np.flatnonzero(self.scored)
        if not len(rows):
            return {"loss": float("nan"), "accuracy": float("nan")}
        truth = self.probabilities[rows, self.labels[rows]].astype(np.float64)
        right = self.probabilities[rows].argmax(1) == self.labels[rows]
        return {"loss": float(-np.log(np.maximum(truth, 1e-30)).mean()), "accuracy": float(right.mean())}


class Labelled(ABC):
    """The larger half of a task; base.Task says what each method is for.

    A task adds its data, and says how the model answers: `logits`, `predict`,
    `loader` and `encoded`.
    """

    metric = "accuracy"
    teacher: Teacher | None = None
    config: Config
    model: nn.Module
    device: torch.device
    amp: str
    data: dict  # {"train": data set, ...}
    features: dict[str, dict[str, Tensor]]  # of each part, once they are computed

    @abstractmethod
    def logits(self, model: nn.Module, batch: dict) -> Tensor:
        """(B, K) for a batch, or for its features."""

    @abstractmethod
    def predict(self, model: nn.Module, loader: Iterable[dict]) -> Predictions:
        """The answers to every row of `loader`, in its order."""

    @abstractmethod
    def loader(self, part: str, batches: Sequence[Sequence]) -> Iterable[dict]:
        """The collated batches of a part."""

    @abstractmethod
    def encoded(self, batch: dict) -> dict[str, Tensor]:
        """What the frozen encoders say of a batch: {name: (B, ...) features}, on any device."""

    def train_batches(self, epoch: int, times: int = 1) -> list[list[int]]:
        size = times * self.config.batch_size
        return epoch_order(len(self.data["train"]), size, self.config.seed, epoch)

    def train_loader(self, epoch: int, batches: list[list[int]]) -> Iterable[dict]:
        if self.config.cache_features:
            return self.cached("train", batches)
        return self.loader("train", train_keys(batches, epoch))

    def loss(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.logits(model, batch)  # (B, K)
        labels = batch["label"].where(batch["valid"], -100)  # cross_entropy leaves -100 out
        count = batch["valid"].sum()
        total = F.cross_entropy(logits, labels, label_smoothing=self.config.smoothing, reduction="sum")
        correct = ((logits.argmax(-1) == labels) & batch["valid"]).sum()
        mean = total / count.clamp(min=1)
        if self.teacher:
            mean = self.teacher.added(mean, logits, batch, batch["valid"])
        return mean, {"correct": correct, "count": count}

    def predictions(self, model: nn.Module, part: str) -> Predictions:
        """Every row of a part once; with several processes each does a share and all get the whole."""
        batches = in_order(len(self.data[part]), 2 * self.config.batch_size)
        mine = batches[distributed.rank() :: distributed.world_size()]
        load = self.cached if self.config.cache_features else self.loader
        shares = distributed.gather_objects(self.predict(model, load(part, mine)) if mine else None)
        order = [row for rank in range(len(shares)) for batch in batches[rank :: len(shares)] for row in batch]
        columns = zip(*((s.probabilities, s.labels, s.valid) for s in shares if s is not None), strict=True)
        back = np.argsort(order)
        return Predictions(*(np.concatenate(column)[back] for column in columns))

    def cached(self, part: str, batches: list[list[int]]) -> Iterable[dict]:
        """The same batches with the frozen encoders' features in the inputs' place."""
        if part not in self.features:
            self.features[part] = self.encode(part)
        kept = self.features[part]
        return ({key: column[rows] for key, column in kept.items()} for rows in batches)

    @torch.no_grad()
    def encode(self, part: str) -> dict[str, Tensor]:
        """Every row of a part through the encoders, once: features (N, ...) float32,
        label, index, valid."""
        training, rows = self.model.training, []
        self.model.to(self.device).eval()
        for batch in self.loader(part, in_order(len(self.data[part]), 2 * self.config.batch_size)):
            with base.autocast(self.device, self.amp):
                features = {name: column.float().cpu() for name, column in self.encoded(batch).items()}
            rows.append(features | {key: batch[key] for key in ("label", "index", "valid")})
        self.model.train(training)
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
