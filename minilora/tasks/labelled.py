"""What classification and multiple choice share: every row has one label, and the answer
is a distribution.

loss = - sum_k t_k log softmax(logits)_k   with t = (1 - smoothing) * one-hot + smoothing / K

A batch's loss is the mean over its B readable rows. With class weights w the terms are w_k t_k log
softmax(logits)_k and their sum is still divided by B, where torch's mean divides by the weights of
the batch: so microbatches, and processes, add up to the gradient of one big batch. Of the two
shares of a --teacher the labels' alone is weighted.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora import ticker
from minilora.data.pictures.loader import epoch_order, in_order
from minilora.errors import UserError
from minilora.report.metrics import classification_metrics
from minilora.tasks.predictor import Predictor
from minilora.tasks.task import Task
from minilora.training.device import autocast
from minilora.training.faults import UNREADABLE


class Predictions(NamedTuple):
    """What a model says of N rows: probabilities (N, K) float32, labels (N,) int64 (-1 unknown),
    valid (N,) bool: a readable picture."""

    probabilities: np.ndarray
    labels: np.ndarray
    valid: np.ndarray

    @property
    def scored(self) -> np.ndarray:
        """(N,) bool: rows with a readable picture and a known label."""
        return self.valid & (self.labels >= 0)

    @property
    def truth(self) -> np.ndarray:
        """(N,) int64: the labels, -1 where there is nothing to score."""
        return np.where(self.valid, self.labels, -1)

    def scores(self) -> dict[str, float]:
        """{"loss", "accuracy"} over the scored rows; loss is the mean of -log p(truth)."""
        rows = np.flatnonzero(self.scored)
        if not len(rows):
            return {"loss": float("nan"), "accuracy": float("nan")}
        truth = self.probabilities[rows, self.labels[rows]].astype(np.float64)
        right = self.probabilities[rows].argmax(1) == self.labels[rows]
        return {"loss": float(-np.log(np.maximum(truth, 1e-30)).mean()), "accuracy": float(right.mean())}

    def class_scores(self) -> dict[str, float]:
        """{"balanced", "f1"}: the mean recall of the classes, F1 weighed by their support."""
        classes = list(map(str, range(self.probabilities.shape[1])))
        found = classification_metrics(self.truth, self.probabilities.argmax(1), classes)
        return {key: found[key] if self.scored.any() else float("nan") for key in ("balanced", "f1")}


class LabelledPredictor(Predictor):
    """Logits become one distribution over the K classes or choices of each row."""

    kind = Predictions
    weights: Tensor | None = None  # (K,) of the classes in the loss, on the device

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K), from logits in float32."""
        return logits.softmax(-1)

    def columns(self, logits: Tensor, batch: dict) -> tuple[np.ndarray, ...]:
        return self.probabilities(logits).cpu().numpy(), batch["label"].numpy(), batch["valid"].numpy()

    def loss(self, logits: Tensor, batch: dict, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        counts = batch["valid"] & (batch["label"] >= 0)
        labels = batch["label"].where(counts, -100)  # cross_entropy leaves -100 out
        total = F.cross_entropy(logits, labels, self.weights, label_smoothing=smoothing, reduction="sum")
        return total, ((logits.argmax(-1) == labels) & counts).sum(), counts


def class_weights(labels: Iterable[int], k: int) -> Tensor:
    """(K,) float32 w_c = N / (K n_c), for n_c of N labels, scaled to a mean of one over the classes
    that occur; 0 for a class that does not."""
    counts = torch.bincount(torch.tensor(list(labels)), minlength=k).double()
    weights = (1 / counts).where(counts > 0, 0.0)
    return (weights * (counts > 0).sum() / weights.sum()).float()


class Labelled(Task):
    """The larger half of both tasks. A task adds its data: `read`, and `encoded` for features."""

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.features: dict[str, dict[str, Tensor]] = {}  # of each part, once they are computed

    @abstractmethod
    def read(self, part: str, batches: Sequence[Sequence]) -> Iterable[dict]:
        """The collated batches of a part; keys are numbers, or (epoch, number) to augment."""

    @abstractmethod
    def encoded(self, batch: dict) -> dict[str, Tensor]:
        """What the frozen encoders say of a batch: {name: (B, ...) features}, on any device."""

    def train_batches(self, epoch: int, times: int = 1) -> list[list[int]]:
        """With --steps-per-shot an epoch passes over the few pictures several times; the numbers of
        the second pass begin at n, those of the third at 2 n."""
        n, size, config = len(self.data["train"]), times * self.config.batch_size, self.config
        if self.unlabelled:
            return self.mixed(lambda u: epoch_order(self.unlabelled, u, config.seed, epoch), size, epoch)
        steps = config.steps_per_shot * (config.shots or 0) / config.epochs
        passes = range(ceil(steps / ceil(n / size)) or 1)
        orders = (epoch_order(n, size, config.seed, self.pass_of(epoch, i)) for i in passes)
        return [[i * n + row for row in batch] for i, order in enumerate(orders) for batch in order]

    def pass_of(self, epoch: int, i: int) -> int:
        """A number of its own for pass i of an epoch, by which it is shuffled and augmented."""
        return epoch + i * self.config.epochs

    def eval_batches(self, part: str) -> list[list[int]]:
        return in_order(len(self.data[part]), self.predictor.batches * self.config.batch_size)

    def loader(self, part: str, batches: Sequence[Sequence[int]], epoch: int | None = None) -> Iterable[dict]:
        n = len(self.data[part])
        if self.config.cache_features:
            return self.cached(part, [[i % n for i in batch] for batch in batches])
        if epoch is None:
            return self.read(part, batches)
        return self.read(part, [[(self.pass_of(epoch, i // n), i % n) for i in batch] for batch in batches])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        found = self.predictions(model, "val")
        if not found.scored.any():
            raise UserError(f"none of the {len(found.valid)} {self.unit} for validation {UNREADABLE}")
        return self.scores(found, "val")

    def scores(self, found: Predictions, part: str) -> dict[str, float]:
        return found.scores()

    def cached(self, part: str, batches: Sequence[Sequence[int]]) -> Iterable[dict]:
        """The batches with the frozen encoders' features in the inputs' place."""
        if part not in self.features:
            self.features[part] = self.encode(part)
        kept = self.features[part]
        return ({key: column[rows] for key, column in kept.items()} for rows in batches)

    @torch.no_grad()
    def encode(self, part: str) -> dict[str, Tensor]:
        """A part through the encoders, once: features (N, ...) float32, label, index, valid."""
        training, rows = self.model.training, []
        self.model.to(self.device).eval()
        batches = self.eval_batches(part)
        for batch in ticker.through(self.read(part, batches), f"encoding {part}, batches", len(batches)):
            with autocast(self.device, self.amp):
                features = {name: column.float().cpu() for name, column in self.encoded(batch).items()}
            rows.append(features | {key: batch[key] for key in ("label", "index", "valid")})
        self.model.train(training)
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
