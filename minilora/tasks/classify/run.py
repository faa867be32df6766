"""Using a picture classifier: predictions, scores, and the zero-shot score of a base model."""

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.data.pictures.folder import Sample, Split, Splits
from minilora.data.pictures.loader import PictureDataset, in_order, make_loader
from minilora.data.pictures.parts import entries, is_folder
from minilora.data.pictures.tables import TABLES, is_labelled, list_tables
from minilora.data.pictures.transforms import build_transform
from minilora.data.sets import loose_part, parts_of, spelled, unlabelled
from minilora.data.shards.files import check_geometry, is_shards
from minilora.data.shards.pictures import ShardSplit
from minilora.errors import UserError
from minilora.report.metrics import classification_metrics, format_metrics, percent
from minilora.report.samples import Example, least_sure, most_confident_mistakes
from minilora.report.sections import MOST_SAMPLED
from minilora.settings.flags import Config
from minilora.tasks.classify import multi
from minilora.tasks.classify.multi import above
from minilora.tasks.classify.prompts import NamesPredictor, check_names
from minilora.tasks.classify.task import ClassifyPredictor, open_data, predictor_for
from minilora.tasks.clip import is_clip, load_clip, restore_clip
from minilora.tasks.labelled import LabelledPredictor, Predictions
from minilora.tasks.method import one_value
from minilora.tasks.run import SHOWN, Evaluation, Picture, Run, choose_part, opened, top_answers, top_table
from minilora.tasks.weights import load_base, picture_flags, restoring
from minilora.textfiles import printable
from minilora.training.device import autocast, to_device

TOP = 5  # classes in a row of predictions.csv


class ClassifyRun(Run):
    """A trained classifier."""

    @cached_property
    def predictor(self) -> LabelledPredictor:
        return predictor_for(self.config, self.device, self.model, self.tokenizer, self.labels)

    @cached_property
    def threshold(self) -> float:
        """Above it a picture has a label: as the best epoch chose; 0.5 until the run has ended."""
        chosen = (self.summary.get("best") or {}).get("threshold")
        return 0.5 if chosen is None else chosen

    def name_classes(self, classes: Sequence[str]) -> None:
        if self.tokenizer is None:
            return super().name_classes(classes)
        check_names(classes, "--classes")
        self.labels, self.keys = list(classes), list(classes)
        self.__dict__.pop("predictor", None)  # that of the old names

    def untrained(self, options: Any) -> Evaluation | None:
        if self.tokenizer is None or self.config.mode == "full" or isinstance(self.config.model, dict):
            return None
        base = replace(self, model=self.base_model(options.weights))
        return base.evaluate(options)

    def restore(self, weights: str | None) -> tuple[nn.Module, dict]:
        if self.tokenizer:
            return restore_clip(self, weights)
        source, model = weights or self.base.get("weights") or self.config.weights, one_value(self.config, "model")
        if isinstance(source, dict):
            raise UserError(
                f"--task {self.task} has one encoder, but its weights are named by tower: {source}; give one path"
            )
        name = source if source and "/" in model and not os.path.isdir(model) else model
        with restoring([source]):
            return load_base(name, source, self.config.seed, len(self.labels), self.config.image_size)

    @torch.inference_mode()
    def predict(
        self, pictures: Sequence[Picture], top_k: int = 5, batch_size: int = 32, classes: Sequence[str] = ()
    ) -> list:
        """The top_k (label, probability) of each picture, most probable first; of several labels
        those above the threshold. BadImage for a broken file. classes: other names, for once."""
        if classes:
            named = copy.copy(self)
            named.name_classes(classes)
            return named.predict(pictures, top_k, batch_size)
        transform, answers = build_transform(self.preprocess), []
        with autocast(self.device, self.amp), self.predictor.keeping(self.model):
            for start in range(0, len(pictures), batch_size):
                images = [transform(opened(picture)) for picture in pictures[start : start + batch_size]]
                inputs = torch.stack(images).to(self.device)
                found = self.predictor.probabilities(self.logits({"image": inputs}).float())
                if self.config.multi_label:
                    answers += [above(self.labels, row, self.threshold) for row in found.cpu().numpy()]
                else:
                    answers += [top_answers(self.labels, row, top_k) for row in found]
        return answers

    def evaluate(self, options: Any) -> Evaluation:
        options = self.settled(options)
        part, split = self.split(options)
        found = predict_split(self.predictor, self.model, split, self.preprocess, options)
        broken = int((~found.valid).sum())
        notes = [f"{broken} of {len(split)} pictures could not be read: their rows are empty"] * bool(broken)
        notes += [printable(f"data: {note}") for note in split.notes]
        if self.config.multi_label:
            return multi.evaluation(found, split, self.labels, part, self.threshold, notes)
        return evaluation(found, split, self.labels, part, notes)

    def split(self, options: Any) -> tuple[str, Split]:
        """--data-dir and --split as (name, Split); without them the data of the training."""
        config = self.data_config(options)
        if options.data_dir is not None:
            known = {*self.keys, *self.labels, *map(spelled, (*self.keys, *self.labels))}
            if (loose := loose_pictures(config, options.split, known)) is not None:
                return options.split or "all", loose
        splits = open_data(config, self.keys, require_train=False)
        part, split = scored_split(splits, options.split, options.data_dir)
        if isinstance(split, ShardSplit):
            check_geometry(split.index["preprocess"], self.preprocess, config.data_dir)
        split.notes = splits.notes
        return part, split

    def batch(self, n: int, options: Any) -> dict[str, Tensor]:
        _, split = self.split(options)
        chosen = by_class(split, n) if n < len(split) else [i % len(split) for i in range(n)]
        dataset = PictureDataset(split, self.preprocess, bad_data=options.bad_data)
        (batch,) = make_loader(dataset, [chosen])
        return to_device(batch, self.device)

    def titles(self, batch: dict[str, Tensor]) -> list[str]:
        if self.config.multi_label and batch["label"].ndim == 2:
            return [multi.spoken(self.labels, row) for row in batch["label"].tolist()]
        return [self.labels[i] if i >= 0 else "" for i in batch["label"].tolist()]


load = ClassifyRun.load


def by_class(split: Split, n: int) -> list[int]:
    """n rows, taken from the classes in turn, so that a few pictures show several classes."""
    seen: dict[int, int] = {}
    turn = []
    for i, sample in enumerate(split):
        seen[sample.label] = seen.get(sample.label, 0) + 1
        turn.append((seen[sample.label], i))
    return [i for _, i in sorted(turn)[:n]]


def loose_pictures(config: Config, part: str | None, known: set[str]) -> Split | None:
    """The pictures of --data-dir as rows without a label, None where it has labels."""
    path, several = Path(config.data_dir), config.multi_label
    if path.is_file():
        return None if path.suffix.lower() in TABLES and is_labelled(path, several) else unlabelled(path)
    if not path.is_dir() or config.data_format in ("csv", "shapes", "shards") or is_shards(path):
        return None
    parts = parts_of(path)
    if part and part not in parts and (folder := loose_part(path, part)):
        return unlabelled(folder)
    folders = {entry.name for entry in entries(path, path, lenient=True) if is_folder(entry)}
    named = {*folders, *map(spelled, folders)} & known
    labelled = any(is_labelled(table, several) for table in list_tables(path))
    return None if parts or named or labelled else unlabelled(path)


def scored_split(splits: Splits, part: str | None, data_dir: str | None) -> tuple[str, Split]:
    """(name, rows) by --split; without it all of a --data-dir without parts, else choose_part's."""
    whole = data_dir is not None and not is_shards(data_dir) and not parts_of(Path(data_dir))
    if part is None and whole and splits.train is not None:
        samples = sorted([*splits.train, *(splits.val or ())], key=lambda sample: (sample.label, sample.path))
        return "all", Split((Sample(*sample) for sample in samples), splits.train.root)
    return choose_part(splits, part)


def predict_split(
    predictor: LabelledPredictor, model: nn.Module, split: Split, preprocess: dict, options: Any
) -> Predictions:
    """The model's answers to a split, in its order."""
    dataset = PictureDataset(split, preprocess, bad_data=options.bad_data)
    batches = in_order(len(split), options.batch_size)
    return predictor.answers(model, make_loader(dataset, batches, options.workers), options.amp, len(batches))


def evaluation(found: Predictions, split: Split, labels: Sequence[str], part: str, notes: Sequence[str]) -> Evaluation:
    """Scores, table rows and pictures for the report from a model's answers."""
    # a part at a time: with thousands of classes the order of all of them is gigabytes
    parts = np.array_split(found.probabilities, 1 + len(split) // 1000)
    order = np.concatenate([np.argsort(-p, axis=1, kind="stable")[:, :TOP] for p in parts])
    chosen, sure = order[:, 0], np.take_along_axis(found.probabilities, order, 1)
    header, rows = top_table((sample.path for sample in split), labels, order, sure)
    rows = [row if valid else [row[0]] + [""] * (len(row) - 1) for row, valid in zip(rows, found.valid, strict=True)]
    table = header, rows, (["file", "label"], [row[:2] for row in rows])
    truth = found.truth
    if not found.scored.any():
        return Evaluation(None, "\n".join([f"{len(split)} pictures without labels", *notes]), *table, part=part)
    metrics = classification_metrics(truth, chosen, labels, found.probabilities)
    usual = max(row["support"] for row in metrics["per_class"]) / metrics["count"]
    scores = found.scores() | {key: metrics[key] for key in ("balanced", "precision", "recall", "f1")}

    def examples(numbers: Sequence[int]) -> list[Example]:
        shown = []
        for i in [i for i in numbers if found.valid[i]][:SHOWN]:
            name = labels[truth[i]] if truth[i] >= 0 else ""
            shown.append(Example(split.load(i), name, labels[chosen[i]], float(sure[i, 0]), name=split[i].path))
        return shown

    return Evaluation(
        scores,
        "\n".join([format_metrics(metrics), *notes]),
        *table,
        part=part,
        baselines={"chance": 1 / len(labels)} | ({"the most frequent class": usual} if usual > 1 / len(labels) else {}),
        metrics=metrics,
        mistakes=examples(most_confident_mistakes(truth, chosen, sure[:, 0], SHOWN)),
        unsure=examples(least_sure(sure, SHOWN)),
        samples=class_samples(split, labels, found.valid),
    )


def class_samples(split: Split, labels: Sequence[str], valid: np.ndarray, each: int = 6) -> dict[str, list]:
    """{class: its first pictures}, which are loaded for as many classes as a page shows."""
    rows: dict[int, list[int]] = {}
    for i, sample in enumerate(split):
        if sample.label >= 0 and valid[i] and len(rows.setdefault(sample.label, [])) < each:
            rows[sample.label].append(i)
    first = sorted(rows)[:MOST_SAMPLED]
    return {labels[label]: [split.load(i) for i in rows[label]] if label in first else [] for label in sorted(rows)}


def zero_shot(config: Config, options: Any, device: torch.device) -> str:
    """A base model with its own head on a labelled folder: top-1 over all its classes, and among
    the folder's. A CLIP has sentences in the head's place, one for each class.

    Which class of the head a folder means: `imagenet_index` in classes.json, or the checkpoint's
    own class names.
    """
    if is_clip(config):
        return zero_shot_names(config, options, device)
    for flag in ("prompt", "tokenizer", "classes"):
        if getattr(options, flag):
            raise UserError(f"--{flag} is for a CLIP; {config.model} has a head with classes of its own")
    name, weights = one_value(config, "model"), one_value(config, "weights")
    model, _ = load_base(name, weights, config.seed, None, config.image_size, picture_flags(config))
    model = model.to(device).eval()
    splits = open_data(config, require_train=False)
    part, split = scored_split(splits, options.split, config.data_dir)
    # (K,): where the folder's classes are in the head
    columns = np.array(head_columns(model, splits, name))
    found = predict_split(ClassifyPredictor(device), model, split, model.preprocess, options)
    rows = np.flatnonzero(found.scored)
    labels, probabilities = found.labels[rows], found.probabilities[rows]
    over_all = float((probabilities.argmax(1) == columns[labels]).mean())
    among = float((probabilities[:, columns].argmax(1) == labels).mean())
    return (
        f"{name}, its own head, {part}, {len(rows)} pictures: accuracy {percent(over_all, len(rows))} over all "
        f"{probabilities.shape[1]} classes, {percent(among, len(rows))} among the folder's {len(columns)}"
    )


def zero_shot_names(config: Config, options: Any, device: torch.device) -> str:
    """The accuracy of a CLIP on a labelled split, in one line."""
    model, _, tokenizer = load_clip(config)
    model = model.to(device).eval()
    splits = open_data(config, options.classes, require_train=False)
    predictor = NamesPredictor(device, model, tokenizer, splits.classes, config.prompt)
    part, split = scored_split(splits, options.split, config.data_dir)
    found = predict_split(predictor, model, split, model.preprocess, options)
    if not (count := int(found.scored.sum())):
        raise UserError(f"{config.data_dir}: no picture with a label to score")
    prompts, chance = " and ".join(map(repr, predictor.templates)), percent(1 / len(splits.classes))
    return (
        f"{config.model}, zero-shot with {prompts}, {part}, {count} pictures: accuracy "
        f"{percent(found.scores()['accuracy'], count)} among {len(splits.classes)} classes | baseline: chance {chance}"
    )


def head_columns(model, splits: Splits, name: str) -> list[int]:
    """The head's class for each class of the data; UserError where one cannot be found."""
    size = model.config.num_classes
    if not size:
        raise UserError(f"{name}: these weights have no classifier to score; train one")
    names = {label: i for i, label in enumerate(getattr(model, "labels", None) or ())}
    columns = []
    for key, label in zip(splits.keys, splits.classes, strict=True):
        index = splits.info.get(key, {}).get("imagenet_index") if size == 1000 else None
        index = names.get(label, names.get(key)) if index is None else index
        if not isinstance(index, int) or not 0 <= index < size:
            known = f"; it knows {', '.join(list(names)[:8])} ..." if names else ", which does not name them"
            way = 'put a classes.json beside the class folders: {"folder": {"name": ..., "imagenet_index": ...}}'
            way = way if size == 1000 else "name the class folders as the model does, or train a head with train.py"
            raise UserError(f"class {label!r} is none of the {size} classes of {name}{known}; {way}")
        columns.append(index)
    return columns
