"""Using a question answerer: answers to one question, scores by the official rules, results files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minilora.adapter import load_adapter
from minilora.data.pictures.images import open_image
from minilora.data.pictures.transforms import build_transform
from minilora.data.questions.vqa2 import VQAPart, clean_question
from minilora.data.questions.vqa_batches import Texts, VQADataset, grouped_batches, vqa_loader
from minilora.data.vqa_sets import Answers, VQASplits, question_only_guess
from minilora.errors import UserError
from minilora.report.metrics import classification_metrics
from minilora.report.samples import Example
from minilora.report.tables import text_table
from minilora.report.vqa_metric import format_vqa
from minilora.settings.flags import Config
from minilora.tasks import base
from minilora.tasks.run import Evaluation, Run, restoring
from minilora.tasks.runfiles import read_labels, read_preprocess, read_summary
from minilora.tasks.vqa.features import grey_batches
from minilora.tasks.vqa.model import load_towers, text_limit, tower_weights
from minilora.tasks.vqa.task import Predictions, logits_of, open_data, predict, probabilities, score
from reference_models import load_pretrained
from reference_models.text.tokenizers import Tokenizer, load_tokenizer

SHOWN = 12  # pictures of a kind on the report page


def load(path: Path, config: Config, recorded: dict, device: torch.device, weights: str | dict | None) -> "VQARun":
    """The run in `path` as a VQARun."""
    answers = Answers(*read_labels(path))
    model = restore(path, config, recorded, weights, len(answers.labels)).to(device).eval()
    preprocess = model.preprocess = read_preprocess(path, model)
    shared = (preprocess, answers.labels, answers.keys, device, read_summary(path))
    return VQARun(path, config, model, recorded, *shared, answers, load_tokenizer(path))


def restore(path: Path, config: Config, recorded: dict, weights: str | dict | None, classes: int):
    """The trained two-tower model: base weights + adapter, or the run's own weights."""
    if config.mode == "full":
        return load_pretrained(path)
    model, found = restore_towers(config, recorded, weights, classes)
    base.check_base(found, recorded, path)
    return load_adapter(model, path)


def restore_towers(config: Config, recorded: dict, weights: str | dict | None, classes: int):
    """The model before training, and the record of the weights that were found."""
    given = recorded.get("weights") or {}
    if not isinstance(given, dict):
        raise UserError(f"--task vqa has two towers, but config.toml names one weight file: {given}")
    if weights is not None:
        moved = tower_weights(config, weights)
        given = given | {tower: source for tower, source in moved.items() if source is not None}
    with restoring(given.values()):
        return load_towers(config, classes, tower_weights(config, given))


@dataclass
class VQARun(Run):
    """A trained question answerer."""

    answers: Answers
    tokenizer: Tokenizer

    @property
    def soft(self) -> bool:
        return self.config.soft_targets

    @torch.inference_mode()
    def predict(
        self, pictures: Sequence[str | PathLike | Image.Image], question: str | Sequence[str] = "", top_k: int = 5
    ) -> list:
        """The top_k (answer, probability) for each picture, most probable first; one question for
        all, or one each."""
        questions = [question] * len(pictures) if isinstance(question, str) else list(question)
        if len(questions) != len(pictures):
            raise UserError(f"{len(pictures)} pictures but {len(questions)} questions; give one for each")
        if not all(text.strip() for text in questions):
            raise UserError('a question is missing; ask one with --question "..."')
        transform, limit = (
            build_transform(self.preprocess),
            text_limit(self.model, self.tokenizer, self.config.max_length),
        )
        answers = []
        for picture, text in zip(pictures, questions, strict=True):
            image = picture if isinstance(picture, Image.Image) else open_image(picture)
            inputs = self.tokenizer([clean_question(text)], max_length=limit)
            images = transform(image.convert("RGB"))[None].to(self.device)
            logits = self.model(images, inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device))
            best = probabilities(logits, self.soft)[0].cpu().topk(min(top_k, len(self.labels)))
            answers.append(
                [(self.labels[k], p) for k, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
            )
        return answers

    def evaluate(self, options: Any) -> Evaluation:
        """Answers to the part of the data that the flags of evaluate.py name."""
        splits = self.splits(options)
        part = choose_part(splits, options.split)
        data = self.dataset(part, options.bad_data)
        batches = grouped_batches(data.picture, options.batch_size)
        loader = vqa_loader(data, batches, None, options.workers)
        found = self.answer_all(loader, batches, options.amp)
        said = found.answers(part, self.labels)
        if not part.answered:
            return evaluation(found, said, part, self.labels)
        baselines = {}
        grey = self.answer_all(grey_batches(data, batches), batches, options.amp)
        baselines["question only: this model, picture greyed out"] = score(grey.answers(part, self.labels), part)
        if splits.train is not None and splits.train is not part:
            guess = question_only_guess(splits.train.questions, part.questions)
            baselines["question only: the most frequent training answer"] = score(guess, part)
        return evaluation(found, said, part, self.labels, data.labels, baselines)

    def answer_all(self, loader, batches: list[list[int]], amp: str) -> Predictions:
        """Predictions in the order of the questions."""
        with base.autocast(self.device, amp):
            found = predict(self.model, loader, self.device, self.soft)
        back = np.argsort([i for batch in batches for i in batch])
        return Predictions(found.classes[back], found.probabilities[back], found.loss[back])

    def dataset(self, part: VQAPart, bad_data: str) -> VQADataset:
        limit = text_limit(self.model, self.tokenizer, self.config.max_length)
        texts = Texts(part.questions, self.tokenizer, limit)
        return VQADataset(part, texts, self.answers.classes(part.questions), self.preprocess, bad_data=bad_data)

    def splits(self, options: Any) -> VQASplits:
        """--data-dir as VQASplits, nothing held out; the data of the training where
        it is not given."""
        config = replace(self.config, bad_data=options.bad_data)
        if options.data_dir is not None:
            other = {"data_dir": options.data_dir, "data_format": options.data_format, "subset": 1.0}
            config = replace(config, **other, val_split=0.0)
        return open_data(config, require_train=False)

    def batch(self, n: int, options: Any) -> dict[str, Tensor]:
        part = choose_part(self.splits(options), options.split)
        data = self.dataset(part, options.bad_data)
        first = np.unique(data.picture, return_index=True)[1]  # one question for each picture
        numbers = [int(first[i % len(first)]) for i in range(n)]
        (batch,) = vqa_loader(data, [numbers], None)
        self.asked = [part.questions[i].text for i in numbers]
        return {key: value.to(self.device) for key, value in batch.items()}

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return logits_of(self.model, batch)

    def pictures(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["image"][batch["image_index"]]

    def titles(self, batch: dict[str, Tensor]) -> list[str]:
        return self.asked

    def base_model(self, weights: str | dict | None = None):
        """The model before training, with a random head."""
        model, _ = restore_towers(self.config, self.base, weights, len(self.labels))
        model.preprocess = self.preprocess
        return model.to(self.device).eval()


def choose_part(splits: VQASplits, name: str | None) -> VQAPart:
    """The part that --split names; without it val, else test, else train."""
    there = splits.parts
    name = name or next(part for part in ("val", "test", "train") if part in there)
    if name not in there:
        raise UserError(f"--split {name}: the data have no such part; they have {', '.join(there)}")
    return there[name]


def evaluation(
    found: Predictions,
    said: dict[int, str],
    part: VQAPart,
    labels: Sequence[str],
    classes: np.ndarray | None = None,
    baselines: dict[str, dict] | None = None,
) -> Evaluation:
    """Scores, table rows and pictures for the report from a model's answers. classes (N,): the
    truth, -1 unknown."""
    header = ["file", "label", "probability"]
    for k in range(2, found.classes.shape[1] + 1):
        header += [f"label_{k}", f"probability_{k}"]
    header += ["question_id", "question"]
    rows = [
        [
            part.pictures[q.picture].path,
            *(cell for k, p in zip(ks, ps, strict=True) for cell in (labels[k], f"{p:.6f}")),
            q.question_id,
            q.text,
        ]
        for q, ks, ps in zip(part.questions, found.classes, found.probabilities, strict=True)
    ]
    submission = (["question_id", "answer"], [[number, answer] for number, answer in said.items()])
    if classes is None:
        return Evaluation(None, f"{len(rows)} questions without answers", header, rows, submission, results=said)
    scores = score(said, part)
    truth = [labels[k] if k >= 0 else q.answer for q, k in zip(part.questions, classes, strict=True)]
    metrics = classification_metrics(truth, [said[q.question_id] for q in part.questions])
    lines = [
        format_vqa(scores),
        f"most common answer: accuracy {metrics['accuracy']:.4f}, weighted precision {metrics['precision']:.4f} "
        f"recall {metrics['recall']:.4f} F1 {metrics['f1']:.4f}",
        f"out of the vocabulary: {int((classes < 0).sum())} of {len(rows)} answers, counted as wrong",
        text_table(
            ["what is seen", scores["metric"]],
            [["picture and question", f"{scores['overall']:.2f}"]]
            + [[name, f"{one['overall']:.2f}"] for name, one in (baselines or {}).items()],
        ),
    ]
    known = found.loss[~np.isnan(found.loss)]
    summary = {"accuracy": scores["accuracy"], "loss": float(known.mean()) if len(known) else None}
    worth = np.array([scores["per_question"][q.question_id] for q in part.questions])

    def examples(numbers: Sequence[int]) -> list[Example]:
        shown = []
        for i in numbers:
            q = part.questions[i]
            image = readable(part, q.picture)
            sure = float(found.probabilities[i, 0])
            text = {"question": q.text, "name": part.pictures[q.picture].path, "correct": bool(worth[i] >= 0.5)}
            shown.append(Example(image, truth[i], said[q.question_id], sure, **text))
        return shown

    wrong = np.flatnonzero(worth < 0.5)
    gap = found.probabilities[:, 0] - found.probabilities[:, min(1, found.probabilities.shape[1] - 1)]
    spread = np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)
    return Evaluation(
        summary | {key: metrics[key] for key in ("precision", "recall", "f1")},
        "\n".join(lines),
        header,
        rows,
        submission,
        vqa=scores | {"question_only": {name: one["overall"] for name, one in (baselines or {}).items()}},
        answer_histogram=Counter(truth).most_common(),
        mistakes=examples(wrong[np.argsort(-found.probabilities[wrong, 0], kind="stable")][:SHOWN]),
        unsure=examples(np.argsort(gap, kind="stable")[:SHOWN]),
        examples=examples(spread),
        results=said,
    )


def readable(part: VQAPart, picture: int) -> Image.Image | None:
    """The picture for the report, None where it cannot be opened."""
    try:
        return part.pictures.load(picture)
    except UserError:
        return None


def zero_shot(config: Config, options: Any, device: torch.device) -> str:
    """A base model has no answers to give."""
    raise UserError("--task vqa: a base model knows no answers before training; run train.py --task vqa first")
