"""Several labels for a picture (--multi-label): each class is there or not, for itself.

p_k  = sigmoid(logits_k)
loss = 1 / K sum_k BCE(logits_k, t_k)      with t = (1 - smoothing) * label + smoothing / 2

A picture has the labels with p_k above one threshold, the one with the best F1 on the validation
data of the best epoch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minilora.data.pictures.folder import Split
from minilora.report.metrics import format_metrics
from minilora.report.multilabel import headline, multilabel_metrics
from minilora.report.samples import Example
from minilora.tasks.labelled import LabelledPredictor
from minilora.tasks.run import SHOWN, Evaluation


class LabelSets(NamedTuple):
    """What a model says of N pictures: probabilities (N, K) float32, labels (N, K) of 0 and 1 (-1
    unknown), valid (N,) bool: a readable picture, loss (N,) of each."""

    probabilities: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    loss: np.ndarray

    @property
    def scored(self) -> np.ndarray:
        """(N,) bool: pictures that are readable and whose labels are known."""
        return self.valid & (self.labels[:, 0] >= 0)

    def metrics(self, classes: Sequence[str], threshold: float | None = None) -> dict:
        """Those of report/multilabel.py, and the mean loss, over the scored pictures."""
        rows = self.scored
        loss = {"loss": float(self.loss[rows].mean()) if rows.any() else float("nan")}
        return loss | multilabel_metrics(self.labels[rows], self.probabilities[rows], classes, threshold)

    def scores(self, threshold: float | None = None) -> dict[str, float]:
        found = self.metrics([""] * self.labels.shape[1], threshold)
        return {key: found[key] for key in ("loss", "accuracy", "map", "f1", "threshold")}


class MultiLabel(LabelledPredictor):
    """Logits become K independent probabilities."""

    kind = LabelSets

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def columns(self, logits: Tensor, batch: dict) -> tuple[np.ndarray, ...]:
        labels = batch["label"] if batch["label"].ndim == 2 else torch.full(logits.shape, -1)
        columns = self.probabilities(logits), labels, batch["valid"], row_losses(logits, labels.to(logits.device))
        return tuple(column.cpu().numpy() for column in columns)

    def loss(self, logits: Tensor, batch: dict, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        counts, labels = batch["valid"], batch["label"]
        right = ((logits > 0) == (labels > 0)).all(-1) & counts
        return row_losses(logits, labels, smoothing).where(counts, 0.0).sum(), right.sum(), counts


def row_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """(B,) the loss of each picture; logits and labels (B, K)."""
    targets = (1 - smoothing) * labels + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)


def above(labels: Sequence[str], probabilities: np.ndarray, threshold: float) -> list[tuple[str, float]]:
    """The (label, probability) above the threshold of probabilities (K,), most probable first."""
    order = np.argsort(-probabilities, kind="stable")
    return [(labels[k], p) for k in order if (p := float(probabilities[k])) > threshold]


def spoken(labels: Sequence[str], there: Sequence[int] | np.ndarray) -> str:
    """The labels of a picture in words; there: K of 0 and 1."""
    return ", ".join(label for label, one in zip(labels, there, strict=True) if one) or "no label"


def evaluation(
    found: LabelSets, split: Split, labels: Sequence[str], part: str, threshold: float, notes: Sequence[str]
) -> Evaluation:
    """Scores, table rows and pictures for the report from a model's answers."""
    said, rows = found.probabilities.astype(np.float64) > threshold, []
    mark = "|" if any(";" in label for label in labels) else ";"
    for i, sample in enumerate(split):
        answer = above(labels, found.probabilities[i], threshold) if found.valid[i] else ()
        rows.append([sample.path, mark.join(label for label, _ in answer), mark.join(f"{p:.6f}" for _, p in answer)])
    table = ["file", "labels", "probabilities"], rows, (["file", "labels"], [row[:2] for row in rows])
    if not found.scored.any():
        return Evaluation(None, "\n".join([f"{len(split)} pictures without labels", *notes]), *table, part=part)
    metrics = found.metrics(labels, threshold)
    # (N,): how far beyond the threshold the worst probability lies on the wrong side
    side = np.where(found.labels > 0, threshold - found.probabilities, found.probabilities - threshold).max(1)
    mistakes = [i for i in np.argsort(-side, kind="stable") if found.scored[i] and side[i] >= 0][:SHOWN]
    classes = {name: np.flatnonzero(found.valid & (found.labels[:, k] > 0))[:6] for k, name in enumerate(labels)}
    return Evaluation(
        {key: metrics[key] for key in ("loss", "accuracy", "map", "precision", "recall", "f1")},
        "\n".join([format_metrics(metrics, parts=headline(metrics)), *notes]),
        *table,
        part=part,
        metrics=metrics,
        mistakes=[
            Example(split.load(i), spoken(labels, split[i].label), spoken(labels, said[i]), name=split[i].path)
            for i in mistakes
        ],
        samples={name: [split.load(i) for i in rows] for name, rows in classes.items() if len(rows)},
    )
