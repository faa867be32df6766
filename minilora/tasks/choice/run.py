"""Using multiple choice: answers, scores by type of question, submissions, zero-shot scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from minilora.data.pictures.loader import in_order, make_loader
from minilora.data.pictures.transforms import build_transform
from minilora.data.questions.choice_batches import ChoiceDataset, choice_collate, collate_choices
from minilora.data.questions.choices import LETTERS, ChoiceSplit, check_choices
from minilora.data.questions.visual7w import results
from minilora.errors import UserError
from minilora.report.metrics import classification_metrics, percent
from minilora.report.samples import Example, least_sure, most_confident_mistakes
from minilora.report.tables import text_table
from minilora.settings.flags import Config
from minilora.tasks.choice.task import ChoicePredictor, ChoicePrompt, accuracy_by_type, open_data
from minilora.tasks.clip import load_clip, restore_clip
from minilora.tasks.labelled import Predictions
from minilora.tasks.method import resolve
from minilora.tasks.run import SHOWN, Evaluation, Picture, Run, choose_part, opened, top_answers
from minilora.training.device import autocast, to_device


class ChoiceRun(Run):
    """A trained model for multiple choice."""

    unit: ClassVar[str] = "questions"

    @property
    def predictor(self) -> ChoicePredictor:
        return ChoicePredictor(self.device)

    @property
    def prompt(self) -> ChoicePrompt:
        """A new one, which has counted nothing yet."""
        return ChoicePrompt(self.tokenizer, self.config, self.model.config)

    def restore(self, weights: str | None) -> tuple[nn.Module, dict]:
        return restore_clip(self, weights)

    @torch.inference_mode()
    def predict(
        self, pictures: Sequence[Picture], question: str | None = None, choices: Sequence[str] | None = None
    ) -> list[list[tuple[str, float]]]:
        """(choice, probability) for each picture, most probable first. Raises BadImage for a broken
        file, UserError without a question and 2 to 26 choices."""
        if not (question or "").strip() or not choices:
            raise UserError(
                'multiple choice needs --question "..." and --choices "A" "B" ...; in a program question="...", '
                'choices=["A", "B"]'
            )
        check_choices(choices, "choices (--choices)")
        transform, answers = build_transform(self.preprocess), []
        asked = {"tokens": self.prompt(question, choices), "label": -1, "index": 0, "picture": 0, "valid": True}
        for picture in pictures:
            item = asked | {"image": transform(opened(picture))}
            batch = to_device(collate_choices([item], self.tokenizer.pad_id), self.device)
            with autocast(self.device, self.amp):
                logits = self.logits(batch).float()
            answers.append(top_answers(choices, logits[0].softmax(-1), len(choices)))
        return answers

    def evaluate(self, options: Any) -> Evaluation:
        options = self.settled(options)
        (name, split, source), prompt = self.split(options), self.prompt
        dataset = ChoiceDataset(split, prompt.of_split(split), self.preprocess, bad_data=options.bad_data)
        batches = in_order(len(split), options.batch_size)
        loader = make_loader(dataset, batches, options.workers, choice_collate(self.tokenizer.pad_id))
        found = self.predictor.answers(self.model, loader, options.amp, len(batches))
        return evaluation(found, split, source, name, prompt.note())

    def split(self, options: Any) -> tuple[str, ChoiceSplit, str]:
        """(name, questions, their format); without --split all of a --data-dir without parts."""
        splits = open_data(self.data_config(options), require_train=False)
        if options.split is None and options.data_dir is not None and splits.whole is not None:
            return "all", splits.whole, splits.source
        return *choose_part(splits, options.split), splits.source

    def batch(self, n: int, options: Any) -> dict:
        _, split, _ = self.split(options)
        chosen = by_picture(split, n)
        asked = split.take(chosen)
        dataset = ChoiceDataset(asked, self.prompt.of_split(asked), self.preprocess, bad_data=options.bad_data)
        (batch,) = make_loader(dataset, [range(n)], collate_fn=choice_collate(self.tokenizer.pad_id))
        first = {question.picture: question for question in reversed(asked.questions)}
        return to_device(batch, self.device) | {"asked": [first[i] for i in dict.fromkeys(q.picture for q in asked)]}

    def titles(self, batch: dict) -> list[str]:
        return [q.choices[q.answer] if q.answer >= 0 else "" for q in batch["asked"]]

    def captions(self, batch: dict) -> list[str]:
        return [f"{q.question} ({truth})" for q, truth in zip(batch["asked"], self.titles(batch), strict=True)]

    def said(self, batch: dict) -> list[str]:
        answers, pictures = super().said(batch), batch["picture"].tolist()
        return [answers[pictures.index(j)] for j in range(len(batch["asked"]))]

    def answer_of(self, batch: dict, row: int, k: int) -> str:
        return batch["asked"][int(batch["picture"][row])].choices[k]


load = ChoiceRun.load


def by_picture(split: ChoiceSplit, n: int) -> list[int]:
    """n rows: one about each picture, then the others, then again from the start."""
    first: dict[int, int] = {}
    for i, question in enumerate(split):
        first.setdefault(question.picture, i)
    order = list(dict.fromkeys([*first.values(), *range(len(split))]))
    return [order[i % len(order)] for i in range(n)]


def evaluation(found: Predictions, split: ChoiceSplit, source: str, name: str, notes: Sequence[str] = ()) -> Evaluation:
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
    table = header, rows, (["ID", "answer"], answers)
    files = {"part": name} | ({"results": results(split, order.tolist())} if source == "visual7w" else {})
    lines, broken = list(notes), int((~found.valid).sum())
    if broken:
        lines.append(f"{broken} of {len(split)} questions have a picture that cannot be read: not scored")
    if not found.scored.any():
        text = "\n".join([f"{len(split)} questions without answers", *lines])
        return Evaluation(None, text, *table, **files)
    truth = found.truth
    metrics = classification_metrics(truth, chosen, list(letters), found.probabilities)
    scores = found.scores() | {key: metrics[key] for key in ("precision", "recall", "f1")}
    shares = {kind: 100 * value for kind, value in accuracy_by_type(found, split).items()}
    count, accuracy = int(found.scored.sum()), 100 * scores["accuracy"]
    by_type = {"metric": "accuracy", "overall": accuracy, "count": count, "by_question_type": shares}
    return Evaluation(
        scores,
        "\n".join([*score_lines(scores, shares, found, split), *lines]),
        *table,
        **files,
        baselines={"chance": 1 / len(letters)},
        vqa=by_type if shares else None,
        mistakes=examples(most_confident_mistakes(truth, chosen, sure, SHOWN), found, split),
        unsure=examples(least_sure(found.probabilities, SHOWN), found, split),
        examples=examples(by_picture(split, min(SHOWN, len(split))), found, split),
    )


def score_lines(scores: dict, shares: dict, found: Predictions, split: ChoiceSplit) -> list[str]:
    """Accuracy beside chance, and by type of question; shares: in percent."""
    count, chance = int(found.scored.sum()), 1 / found.probabilities.shape[1]
    line = f"accuracy {percent(scores['accuracy'], count)} | baseline: chance {percent(chance)}"
    line += f" | log loss {scores['loss']:.4f} | {count} questions"
    if not shares:
        return [line]
    kinds = [split[i].kind for i in np.flatnonzero(found.scored)]
    table = [[kind, f"{share:.2f}", kinds.count(kind)] for kind, share in shares.items()]
    return [line, text_table(["type", "accuracy %", "questions"], table)]


def examples(numbers: Sequence[int], found: Predictions, split: ChoiceSplit) -> list[Example]:
    """Pictures with question, choices and their probabilities."""
    cards = []
    for i in (i for i in numbers if found.valid[i]):
        question, p = split[i], found.probabilities[i].tolist()
        place, known = int(found.probabilities[i].argmax()), question.answer >= 0
        truth, right = (question.choices[question.answer], place == question.answer) if known else ("", None)
        said, choices = (question.choices[place], p[place]), list(zip(question.choices, p, strict=True))
        cards.append(Example(split.load(i), truth, *said, question.question, choices, split.path(i), right))
    return cards


def zero_shot(config: Config, options: Any, device: torch.device) -> str:
    """The accuracy of a base model before any training, so that the gain is visible."""
    resolve(config, config.model)
    model, record, tokenizer = load_clip(config)
    run = ChoiceRun(Path(config.model), config, record, [], [], device, model.to(device).eval(), model.preprocess)
    run.tokenizer = tokenizer
    found = run.evaluate(options)
    return f"{config.model}, zero-shot, {found.part}, {len(found.rows)} questions\n{found.text}"
