"""From a batch to answers: the one way that training, validation and a finished run share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minilora import ticker
from minilora.training.device import autocast, to_device


class Predictor(ABC):
    """A task's own arithmetic, held by the task and by its runs. It holds no model, so that several
    can be asked in turn; `device` is where they are."""

    kind: type[NamedTuple]  # what `predict` returns: columns of N rows
    batches = 2  # of training go into one of validation

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)

    @abstractmethod
    def logits(self, model: nn.Module, batch: dict) -> Tensor:
        """(B, K) for a batch, or for features of it that were computed before."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: dict, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of the rows' losses (), right answers (), which rows count (B,) bool)."""

    @abstractmethod
    def columns(self, logits: Tensor, batch: dict) -> tuple[np.ndarray, ...]:
        """The columns of `kind` for the B rows of a batch; logits (B, K) float32."""

    def keeping(self, model: nn.Module) -> AbstractContextManager:
        """Inside, what does not depend on the batch may be computed once."""
        return nullcontext()

    @torch.no_grad()
    def predict(self, model: nn.Module, loader: Iterable[dict]) -> NamedTuple:
        """The answers to every row of `loader`, in its order."""
        parts = []
        with self.keeping(model):
            for batch in loader:
                logits = self.logits(model, to_device(batch, self.device)).float()
                parts.append(self.columns(logits, batch))
        return self.kind(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def answers(self, model: nn.Module, loader: Iterable[dict], amp: str, total: int) -> NamedTuple:
        """The same in precision `amp`, for a person who waits for `total` batches."""
        with autocast(self.device, amp):
            return self.predict(model, ticker.through(loader, "evaluation, batches", total))
