"""Picture classification: one encoder, one head, cross entropy.

logits = head(encoder(picture))            --head linear, (B, 3, S, S) -> (B, K)
       = exp(logit_scale) * cos(picture, sentence of class k)      --head names, see prompts.py
Several labels for a picture (--multi-label): multi.py
loss = - sum_k t_k log softmax(logits)_k   with t = (1 - smoothing) * one-hot + smoothing / K
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from minilora.data.pictures.folder import Splits
from minilora.data.pictures.loader import PictureDataset, make_loader
from minilora.data.sets import few_shots, load_classification
from minilora.data.shards.files import check_geometry
from minilora.data.shards.pictures import ShardDataset
from minilora.data.unlabelled import add_unlabelled, is_prepared, joined
from minilora.errors import UserError
from minilora.settings.flags import Config
from minilora.settings.values import option
from minilora.tasks.classify.multi import LabelSets, MultiLabel
from minilora.tasks.classify.prompts import NamesPredictor, check_names
from minilora.tasks.clip import is_clip, load_clip, trained_heads
from minilora.tasks.labelled import Labelled, LabelledPredictor, Predictions, class_weights
from minilora.tasks.method import make_trainable, one_value, resolve
from minilora.tasks.teacher import teacher_names
from minilora.tasks.weights import load_base, picture_flags
from minilora.training.device import autocast
from reference_models.text.tokenizers import Tokenizer

DEFAULT_MODEL = "vit-nano-patch8-48"
FORMATS = ("auto", "folder", "csv", "shapes", "shards")


def load_model(config: Config, classes: Sequence[str]) -> tuple[nn.Module, dict, Tokenizer | None]:
    """(model, record of its weights, tokenizer of the class names for --head names)."""
    if config.head == "names":
        check_names(classes, config.data_dir)
        model, record, tokenizer = load_clip(config)
        model.labels = list(classes)
        return model, record, tokenizer
    name, weights = one_value(config, "model"), one_value(config, "weights")
    flags, new_head = picture_flags(config), not config.adapter  # which brings its own
    model, record = load_base(name, weights, config.seed, len(classes), config.image_size, flags, new_head)
    replace_foreign_head(model, classes, config.seed, new_head)
    for flag in ("lora_r", "lora_alpha"):
        one_value(config, flag)
    return model, record, None


def default_head(config: Config) -> str:
    """A model that compares pictures with texts needs no new head; but the classes' sentences
    compete, so not for several labels."""
    return "names" if config.model and is_clip(config) and not config.multi_label else "linear"


def open_data(config: Config, classes: Sequence[str] | None = None, require_train: bool = True) -> Splits:
    """The data of --data-dir, or generated shapes; classes: those of an earlier run."""
    fmt = "shapes" if config.data_dir is None and config.data_format == "auto" else config.data_format
    if fmt not in FORMATS:
        raise UserError(f"--data-format {fmt} is not for --task classify; choose from {', '.join(FORMATS)}")
    if fmt == "shapes" and config.data_dir is not None:
        raise UserError("--data-format shapes generates its pictures; leave --data-dir out")
    cut, check = (config.val_split, config.subset, config.seed), config.bad_data == "error"
    splits = load_classification(config.data_dir, fmt, *cut, classes, check, require_train, config.multi_label)
    if config.shots and splits.train is not None:
        splits.train = few_shots(splits, config.shots, config.seed)
    return splits


def replace_foreign_head(model: nn.Module, classes: Sequence[str], seed: int, new_head: bool) -> None:
    """A checkpoint's head with the right number of classes, but other ones, is replaced too."""
    known = getattr(model, "labels", None)
    if known and list(known) != list(classes):
        if new_head:
            print("head: the checkpoint's classes have other names; a new random head replaces it")
        torch.manual_seed(seed)
        model.reset_classifier(len(classes))
    model.labels = list(classes)


class ClassifyPredictor(LabelledPredictor):
    """One distribution over the classes for each picture."""

    def logits(self, model: nn.Module, batch: dict) -> Tensor:
        return model.head(batch["features"]) if "features" in batch else model(batch["image"])


class MultiLabelPredictor(MultiLabel, ClassifyPredictor):
    """K independent probabilities for each picture."""


def predictor_for(
    config: Config, device: str | torch.device, model: nn.Module, tokenizer: Tokenizer | None, classes: Sequence[str]
) -> LabelledPredictor:
    """That of the head: sentences of the class names where there is a tokenizer, else logits."""
    if tokenizer:
        return NamesPredictor(device, model, tokenizer, classes, config.prompt)
    return (MultiLabelPredictor if config.multi_label else ClassifyPredictor)(device)


class Classify(Labelled):
    """Picture classification, see Task; with a tokenizer the classes are sentences."""

    def __init__(self, config: Config, device: str | torch.device = "cpu"):
        """The data come first: a wrong folder is reported at once."""
        resolve(config, DEFAULT_MODEL)
        config.head = config.head or default_head(config)
        for flag in () if config.head == "names" else ("prompt", "tokenizer", "text_pooling"):
            if getattr(config, flag):
                raise UserError(f"{option(flag)} has no effect with --head linear, where classes are no sentences")
        splits = open_data(config)
        if (names := teacher_names(config, splits.keys)) and names["keys"] != splits.keys:
            splits = open_data(config, names["keys"])
        add_unlabelled(splits, config.distill_unlabelled, config.bad_data)
        self.labels, self.keys = splits.classes, splits.keys
        model, record, self.tokenizer = load_model(config, self.labels)
        make_trainable(model, config, trained_heads(model, config) if self.tokenizer else model.head_modules)
        predictor = predictor_for(config, device, model, self.tokenizer, self.labels)
        super().__init__(config, model, record, splits, predictor)
        parts = {"train": joined(splits), "val": splits.val, "test": splits.test}
        self.unlabelled = len(splits.unlabelled or ())
        self.data = {name: self.dataset(split, name) for name, split in parts.items() if split is not None}
        self.finish = None
        if is_prepared(splits.train):
            from minilora.data.pictures.batch_augment import Finish  # here: takes a second

            self.finish = Finish(self.preprocess, config.augment, self.device)
        if config.class_weights == "auto":
            labels = (sample.label for sample in splits.train)
            predictor.weights = class_weights(labels, len(self.labels)).to(self.device)

    def dataset(self, split: Sequence, part: str) -> PictureDataset | ShardDataset:
        augment = self.config.augment if part == "train" else "none"
        if is_prepared(split):
            check_geometry(split.index["preprocess"], self.preprocess, self.config.data_dir)
            return ShardDataset(split, augment, self.config.seed)
        return PictureDataset(split, self.preprocess, augment, self.config.seed, self.config.bad_data)

    def read(self, part: str, batches: Sequence[Sequence]) -> Iterable[dict]:
        rows = make_loader(self.data[part], batches, self.workers)
        return self.finish(rows) if self.finish else rows  # shards: the rest happens on the device

    def encoded(self, batch: dict) -> dict[str, Tensor]:
        tower = self.model.vision if self.tokenizer else self.model
        return {"features": tower.pooled(batch["image"].to(self.device))}  # (B, d)

    def zero_shot(self) -> dict[str, float] | None:
        if self.tokenizer is None or isinstance(self.config.model, dict):
            return None  # new projections know nothing
        with autocast(self.device, self.amp):
            scores = self.evaluate(self.model.eval())
        test = self.test(self.model) or {}
        return {"accuracy": scores["accuracy"]} | {f"test_{key}": test[key] for key in ("accuracy",) if test}

    def scores(self, found: Predictions | LabelSets, part: str) -> dict[str, float]:
        if isinstance(found, LabelSets):
            return found.scores(self.best.get("threshold") if part == "test" else None)
        return found.scores() | found.class_scores()

    def file_of(self, row: int, part: str = "train") -> str:
        return self.data[part].split[row].path

    def data_lines(self) -> list[str]:
        where = self.config.data_dir or "generated shapes"
        counts = ", ".join(f"{n} {part}" for part, n in self.rows().items())
        notes = [f"data: {note}" for note in self.splits.notes]
        if (weights := self.predictor.weights) is not None:
            order = weights.argsort().tolist()
            ends = (f"{weights[k]:.3g} for {self.labels[k]!r}" for k in (order[0], order[-1]))
            notes.append(f"class weights: {' to '.join(ends)}, by 1 / pictures in train")
        return [f"data: {where}: {counts} pictures, {len(self.labels)} classes", *notes]


build = Classify
