"""A finished run, opened again: model, labels and preprocessing from the run directory and the base
weights it names.

run = load_run("runs/classify-lora-000")
run.predict(["dog.jpg"])        # [[("beagle", 0.93), ("Border_terrier", 0.04), ...]]
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from minilora.adapter import load_adapter
from minilora.data.pictures.images import open_image
from minilora.errors import UserError
from minilora.report.samples import Example
from minilora.settings.flags import Config
from minilora.tasks.precision import choose_amp
from minilora.tasks.predictor import Predictor
from minilora.tasks.runfiles import read_labels, read_preprocess, read_summary
from minilora.tasks.towers import check_tokenizer
from minilora.tasks.weights import check_base
from minilora.training.device import autocast
from reference_models import load_pretrained
from reference_models.text.tokenizers import Tokenizer, load_tokenizer

WEIGHT_FILES = {"full": "model.safetensors", "lora": "adapter_model.safetensors", "linear": "adapter_model.safetensors"}
SHOWN = 12  # pictures of a kind on the report page
Picture = str | PathLike | Image.Image  # a file, or one that is open


@dataclass
class Evaluation:
    """A model's answers to one part of a data set.

    scores: {"accuracy", "precision", "recall", "f1", "loss"} as fractions, None where
    nothing has a label.
    text: what evaluate.py prints. header, rows: predictions.csv, one row per input in its order.
    part: which one; baselines: {name: accuracy without having learned}. submission: header and rows
    for a competition; results: {question_id: answer}, for VQA's.
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
    part: str = "all"
    baselines: dict[str, float] = field(default_factory=dict)


@dataclass
class Run(ABC):
    """What every task's run has; a task adds the abstract methods and `predict(pictures, ...)`."""

    unit: ClassVar[str] = "pictures"  # what is scored
    path: Path
    config: Config
    base: dict[str, Any]  # the record of the base weights in config.toml
    labels: list[str]
    keys: list[str]
    device: torch.device
    model: nn.Module | None = None  # None only while it is being loaded
    preprocess: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    amp: str = "fp32"  # the precision of the answers; as loaded, that of the training

    def __repr__(self) -> str:
        labels = f"{len(self.labels)} labels" if self.task != "choice" else "choices"
        return f"{type(self).__name__}({self.name}: {self.config.model_name}, mode {self.config.mode}, {labels})"

    @classmethod
    def load(
        cls, path: Path, config: Config, recorded: dict, device: torch.device, weights: str | dict | None
    ) -> "Run":
        """The run in `path`: base weights + adapter, or the run's own weights."""
        run = cls(path, config, recorded, *read_labels(path), device)
        run.amp = choose_amp(config, device)
        if config.mode == "full":
            model = load_pretrained(path)
        else:
            model, found = run.restore(weights)
            check_base(found, recorded, path)
            load_adapter(model, path)
        run.model = model.to(device).eval()
        run.preprocess = run.model.preprocess = read_preprocess(path, run.model)
        run.summary = read_summary(path)
        run.check()
        return run

    def check(self) -> None:
        """UserError where model and tokenizer do not belong together."""
        if self.tokenizer:
            check_tokenizer(self.model, self.tokenizer)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """That of questions, choices or class names; None where the model reads no text."""
        return load_tokenizer(self.path) if self.task != "classify" or self.config.head == "names" else None

    @abstractmethod
    def restore(self, weights: str | dict | None) -> tuple[nn.Module, dict]:
        """(base model with a random head, record of its weights); weights: where they are now."""

    @property
    @abstractmethod
    def predictor(self) -> Predictor:
        """That of the task."""

    @abstractmethod
    def evaluate(self, options: Any) -> Evaluation:
        """The answers to the part of the data that the flags of evaluate.py name."""

    def name_classes(self, classes: Sequence[str]) -> None:
        """Give the classes new names, which are sentences; UserError where they are none."""
        raise UserError(f"--classes: the classes of {self.name} are no sentences; it needs a run with --head names")

    def untrained(self, options: Any) -> Evaluation | None:
        """The answers of the base model to the same part; None where it has none to give."""
        return None

    @abstractmethod
    def batch(self, n: int, options: Any) -> dict:
        """n items of that part, of as many kinds as there are, on the run's device."""

    @abstractmethod
    def titles(self, batch: dict) -> list[str]:
        """A line for each of the batch's pictures."""

    @torch.inference_mode()
    def said(self, batch: dict) -> list[str]:
        """The answer to each of the batch's pictures, with its probability in percent."""
        with autocast(self.device, self.amp):
            shares = self.predictor.probabilities(self.logits(batch).float())  # (n, K)
        best = zip(shares.argmax(-1).tolist(), shares.amax(-1).tolist(), strict=True)
        return [f"{100 * p:.0f} % {self.answer_of(batch, row, k)}" for row, (k, p) in enumerate(best)]

    def answer_of(self, batch: dict, row: int, k: int) -> str:
        """What answer k means for a row of the batch."""
        return self.labels[k]

    def captions(self, batch: dict) -> list[str]:
        """What is asked about each of the batch's pictures, and the truth."""
        return self.titles(batch)

    def pictures(self, batch: dict) -> Tensor:
        """(n, 3, S, S), for attention maps."""
        return batch["image"]

    def logits(self, batch: dict) -> Tensor:
        """The model's answer to such a batch, (n, K)."""
        return self.predictor.logits(self.model, batch)

    def settled(self, options: Any) -> Any:
        """The flags of evaluate.py, with --amp and --batch-size of validation where they are left
        open: the same batches in the same precision have the same bits."""
        size = options.batch_size or self.predictor.batches * self.config.batch_size
        return replace(options, amp=options.amp or self.amp, batch_size=size)

    def base_model(self, weights: str | dict | None = None) -> nn.Module:
        """The model before training, with a random head."""
        model, _ = self.restore(weights)
        model.preprocess = self.preprocess
        return model.to(self.device).eval()

    def data_config(self, options: Any, **changes: Any) -> Config:
        """The run's configuration; with evaluate.py's --data-dir that set, whole, and `changes`."""
        config = replace(self.config, bad_data=options.bad_data)
        if options.data_dir is None:
            return config
        other = {"data_dir": options.data_dir, "data_format": options.data_format, "subset": 1.0, "shots": None}
        return replace(config, **other | changes)

    @property
    def task(self) -> str:
        return self.config.task

    @property
    def name(self) -> str:
        return self.path.resolve().name


def opened(picture: Picture) -> Image.Image:
    """The picture as RGB; BadImage for a broken file."""
    return picture.convert("RGB") if isinstance(picture, Image.Image) else open_image(picture)


def choose_part(splits: Any, name: str | None) -> tuple[str, Any]:
    """(name, data) of the part that --split names, or the first there is of val, test, train."""
    there = {part: data for part in ("train", "val", "test") if (data := getattr(splits, part))}
    name = name or next(part for part in ("val", "test", "train") if part in there)
    if name not in there:
        raise UserError(f"--split {name}: the data have no such part; they have {', '.join(there)}")
    return name, there[name]


def top_table(paths: Iterable[str], labels: Sequence[str], best: Any, sure: Any) -> tuple[list[str], list[list]]:
    """(header, rows) of predictions.csv: each file's k most probable labels; best, sure (N, k)."""
    more = [name for place in range(2, best.shape[1] + 1) for name in (f"label_{place}", f"probability_{place}")]
    rows = [
        [path, *(cell for k, p in zip(*row, strict=True) for cell in (labels[k], f"{p:.6f}"))]
        for path, *row in zip(paths, best, sure, strict=True)
    ]
    return ["file", "label", "probability", *more], rows


def top_answers(labels: Sequence[str], probabilities: Tensor, k: int) -> list[tuple[str, float]]:
    """The k most probable (label, probability) of probabilities (K,), the first of equals first."""
    values, order = probabilities.cpu().sort(descending=True, stable=True)
    return [(labels[i], p) for i, p in zip(order[:k].tolist(), values[:k].tolist(), strict=True)]
