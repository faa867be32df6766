"""Using multiple choice: answers with probabilities, scores by type of question, submissions,
zero-shot scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minilora.adapter import load_adapter
from minilora.data.pictures.folder import Sample, Split
from minilora.data.pictures.images import open_image
from minilora.data.pictures.loader import in_order, make_loader
from minilora.data.questions.choice_batches import ChoiceDataset, choice_collate
from minilora.data.questions.choices import LETTERS, ChoiceSplit, ChoiceSplits, Question, check_choices
from minilora.data.questions.visual7w import results
from minilora.errors import UserError
from minilora.report.metrics import classification_metrics
from minilora.report.samples import Example, least_sure, most_confident_mistakes
from minilora.report.tables import text_table
from minilora.settings.flags import Config
from minilora.tasks import base
from minilora.tasks.choice.task import accuracy_by_type, load_clip, logits_of, open_data, predict
from minilora.tasks.choice.text import Texts, check_tokenizer, text_sizes
from minilora.tasks.labelled import Predictions
from minilora.tasks.run import Evaluation, Run, restoring
from minilora.tasks.runfiles import read_labels, read_preprocess, read_summary
from reference_models import load_pretrained
from reference_models.text.tokenizers import Tokenizer, load_tokenizer

SHOWN = 12  # pictures of a kind on the report page


def load(path: Path, config: Config, recorded: dict, device: torch.device, weights: str | None) -> "ChoiceRun":
    """The run in `path` as a ChoiceRun."""
    labels, keys = read_labels(path)
    tokenizer = load_tokenizer(path)
    if config.mode == "full":
        model = load_pretrained(path)
    else:
        model, found = restore_clip(config, recorded, weights, tokenizer)
        base.check_base(found, recorded, path)
        load_adapter(model, path)
    model = model.to(device).eval()
    check_tokenizer(model, tokenizer)
    preprocess = model.preprocess = read_preprocess(path, model)
    known = labels, keys, device, read_summary(path)
    return ChoiceRun(path, config, model, recorded, preprocess, *known, tokenizer)


class OnePicture(Split):
    """A picture that is already open, as a split."""

    def __init__(self, image: Image.Image):
        super().__init__([Sample("picture", -1)], "")
        self.image = image

    def load(self, i: int) -> Image.Image:
        return self.image


@dataclass
class ChoiceRun(Run):
    """A trained model for multiple choice."""

    tokenizer: Tokenizer

    @property
    def texts(self) -> Texts:
        return Texts(self.tokenizer, self.config, self.model.config.context)

    @torch.inference_mode()
    def predict(
        self,
        pictures: Sequence[str | PathLike | Image.Image],
        question: str | None = None,
        choices: Sequence[str] | None = None,
    ) -> list[list[tuple[str, float]]]:
        """(choice, probability) for each picture, most probable first. Raises BadImage for a broken
        file, UserError without a question and 2 to 26 choices."""
        if not question or not choices:
            raise UserError('multiple choice needs --question "..." and --choices "A" "B" ...')
        check_choices(choices, "--choices")
        answers, texts = [], self.texts
        for picture in pictures:
            image = picture.convert("RGB") if isinstance(picture, Image.Image) else open_image(picture)
            asked = ChoiceSplit([Question(0, 0, question, tuple(choices))], OnePicture(image))
            dataset = ChoiceDataset(asked, texts.of_split(asked), self.preprocess)
            batch = self.to_device(choice_collate(self.tokenizer.pad_id)([dataset[0]]))
            best = logits_of(self.model, batch)[0].softmax(-1).sort(descending=True, stable=True)
            answers.append([(choices[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)])
        return answers

    def evaluate(self, options: Any) -> Evaluation:
        """Answers to the part of the data that the flags of evaluate.py name."""
        split, source = self.split(options)
        texts = self.texts
        found = predict_split(self.model, split, texts, self.preprocess, options, self.device)
        return evaluation(found, split, source, texts.note())

    def split(self, options: Any) -> tuple[ChoiceSplit, str]:
        """--data-dir and --split as questions, with their format; the data of the training where
        they are not given."""
        config = replace(self.config, bad_data=options.bad_data)
        if options.data_dir is not None:
            config = replace(config, data_dir=options.data_dir, data_format=options.data_format, subset=1.0)
        splits = open_data(config, require_train=False)
        return choose_part(splits, options, whole=options.data_dir is not None), splits.source

    def batch(self, n: int, options: Any) -> dict:
        split, _ = self.split(options)
        chosen = spread(split, n)
        asked = split.take(chosen)
        dataset = ChoiceDataset(asked, self.texts.of_split(asked), self.preprocess, bad_data=options.bad_data)
        (batch,) = make_loader(dataset, [range(n)], collate_fn=choice_collate(self.tokenizer.pad_id))
        titles = {q.picture: q.choices[q.answer] if q.answer >= 0 else "" for q in reversed(asked.questions)}
        order = dict.fromkeys(question.picture for question in asked)
        return self.to_device(batch) | {"titles": [titles[picture] for picture in order]}

    def to_device(self, batch: dict) -> dict:
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def logits(self, batch: dict) -> Tensor:
        return logits_of(self.model, batch)

    def pictures(self, batch: dict) -> Tensor:
        return batch["image"]

    def titles(self, batch: dict) -> list[str]:
        return batch["titles"]

    def base_model(self, weights: str | None = None) -> nn.Module:
        """The model before training."""
        model, _ = restore_clip(self.config, self.base, weights, self.tokenizer)
        model.preprocess = self.preprocess
        return model.to(self.device).eval()


def restore_clip(config: Config, recorded: dict, weights: str | None, tokenizer: Tokenizer) -> tuple[nn.Module, dict]:
    """The base model that the run started from, and the record of what was found."""
    source = weights or recorded.get("weights") or config.weights
    sizes = text_sizes(config.model, source, tokenizer)
    with restoring([source]):
        return base.load_base(config.model, source, config.seed, None, config.image_size, **sizes)


def spread(split: ChoiceSplit, n: int) -> list[int]:
    """n rows about different pictures as far as there are so many, then the others, then
    again from the start."""
    first: dict[int, int] = {}
    for i, question in enumerate(split):
        first.setdefault(question.picture, i)
    leading = set(first.values())
    order = [*first.values(), *(i for i in range(len(split)) if i not in leading)]
    return [order[i % len(order)] for i in range(n)]


def choose_part(splits: ChoiceSplits, options: Any, whole: bool) -> ChoiceSplit:
    """The part that --split names. Without it: test for --submission; everything of a set without
    parts; else val, test or train, the first that is there."""
    parts = {"val": splits.val, "test": splits.test, "train": splits.train}
    there = {name: split for name, split in parts.items() if split is not None and len(split)}
    part = options.split
    if part is None and options.submission and "test" in there:
        part = "test"
    if part is None and whole and splits.whole is not None:
        return splits.whole
    part = part or next(iter(there))
    if part not in there:
        raise UserError(f"--split {part}: the data have no such part; they have {', '.join(there)}")
    return there[part]


def predict_split(
    model: nn.Module, split: ChoiceSplit, texts: Texts, preprocess: dict, options: Any, device: torch.device
) -> Predictions:
    """The model's answers to a split, in its order."""
    dataset = ChoiceDataset(split, texts.of_split(split), preprocess, bad_data=options.bad_data)
    collate = choice_collate(texts.tokenizer.pad_id)
    loader = make_loader(dataset, in_order(len(split), options.batch_size), options.workers, collate_fn=collate)
    with base.autocast(device, options.amp):
        return predict(model, loader, device)


def evaluation(found: Predictions, split: ChoiceSplit, source: str, notes: Sequence[str] = ()) -> Evaluation:
    """Scores, table rows and pictures for the report from a model's answers.

    A question whose picture is broken has an empty row in the predictions; in a submission, where
    every row needs an answer, it has the one that fits a picture of nothing.
    """
    order = np.argsort(-found.probabilities, axis=1, kind="stable")  # (N, C)
    letters = LETTERS[: order.shape[1]]
    chosen, sure = order[:, 0], found.probabilities.max(1)
    header = ["id", "file", "answer", "choice", "probability", *letters]
    rows = []
    for i, question in enumerate(split):
        cells = [letters[chosen[i]], question.choices[chosen[i]], f"{sure[i]:.6f}"]
        cells += [f"{p:.6f}" for p in found.probabilities[i]]
        rows.append([question.id, split.path(i), *(cells if found.valid[i] else [""] * len(cells))])
    answers = [[question.id, letters[place]] for question, place in zip(split, chosen, strict=True)]
    files = {"submission": (["ID", "answer"], answers)}
    if source == "visual7w":
        files["results"] = results(split, order.tolist())
    lines, broken = list(notes), int((~found.valid).sum())
    if broken:
        lines.append(f"{broken} of {len(split)} questions have a picture that cannot be read: not scored")
    if not found.scored.any():
        text = "\n".join([f"{len(split)} questions without answers", *lines])
        return Evaluation(None, text, header, rows, **files)
    truth = np.where(found.valid, found.labels, -1)
    metrics = classification_metrics(truth, chosen, list(letters), found.probabilities)
    by_type = accuracy_by_type(found, split)
    scores = found.scores() | {key: metrics[key] for key in ("precision", "recall", "f1")}
    return Evaluation(
        scores,
        "\n".join([*score_lines(scores, by_type, found, split), *lines]),
        header,
        rows,
        **files,
        metrics=metrics,
        vqa=type_scores(scores, by_type, found),
        mistakes=examples(most_confident_mistakes(truth, chosen, sure, SHOWN), found, split),
        unsure=examples(least_sure(found.probabilities, SHOWN), found, split),
        examples=examples(spread(split, min(SHOWN, len(split))), found, split),
    )


def score_lines(scores: dict, by_type: dict, found: Predictions, split: ChoiceSplit) -> list[str]:
    """Accuracy beside chance, and by type of question."""
    count, chance = int(found.scored.sum()), 1 / found.probabilities.shape[1]
    line = f"accuracy {scores['accuracy']:.4f} (chance {chance:.4f})"
    line += f" | log loss {scores['loss']:.4f} | {count} questions"
    if not by_type:
        return [line]
    kinds = [split[i].kind for i in np.flatnonzero(found.scored)]
    table = [[kind, f"{value:.4f}", kinds.count(kind)] for kind, value in by_type.items()]
    return [line, text_table(["type", "accuracy", "questions"], table)]


def type_scores(scores: dict, by_type: dict, found: Predictions) -> dict | None:
    """For the report page: accuracy by type of question, in percent."""
    if not by_type:
        return None
    return {
        "metric": "accuracy",
        "overall": 100 * scores["accuracy"],
        "count": int(found.scored.sum()),
        "by_question_type": {kind: 100 * value for kind, value in by_type.items()},
    }


def examples(numbers: Sequence[int], found: Predictions, split: ChoiceSplit) -> list[Example]:
    """Pictures with question, choices and their probabilities."""
    cards = []
    for i in (i for i in numbers if found.valid[i]):
        question, p = split[i], found.probabilities[i]
        place, choices = int(p.argmax()), [(c, float(q)) for c, q in zip(question.choices, p, strict=True)]
        truth = question.choices[question.answer] if question.answer >= 0 else ""
        right = place == question.answer if question.answer >= 0 else None
        text = question.question
        cards.append(
            Example(split.load(i), truth, question.choices[place], float(p[place]), text, choices, split.path(i), right)
        )
    return cards


def zero_shot(config: Config, options: Any, device: torch.device) -> str:
    """The accuracy of a base model without any training, so that the gain from training is visible."""
    base.resolve(config, config.model)
    splits = open_data(config, require_train=False)
    model, _, tokenizer = load_clip(config)
    model = model.to(device).eval()
    split = choose_part(splits, options, whole=True)
    texts = Texts(tokenizer, config, model.config.context)
    found = predict_split(model, split, texts, model.preprocess, options, device)
    return f"{config.model}, zero-shot\n{evaluation(found, split, splits.source, texts.note()).text}"
