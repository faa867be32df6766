"""Using a question answerer: answers to a question, scores by the official rules, results files."""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from minilora.data.pictures.transforms import build_transform
from minilora.data.questions.vqa2 import VQAPart, clean_question
from minilora.data.questions.vqa_batches import Texts, VQADataset, grouped_batches, vqa_loader
from minilora.data.vqa_sets import Answers, VQASplits, question_only_guess
from minilora.errors import UserError
from minilora.report.metrics import classification_metrics, weighted_line
from minilora.report.samples import Example
from minilora.report.tables import text_table
from minilora.report.vqa_metric import format_vqa
from minilora.settings.flags import Config
from minilora.tasks.run import SHOWN, Evaluation, Picture, Run, choose_part, opened, top_answers, top_table
from minilora.tasks.towers import load_towers, moved_weights, text_limit
from minilora.tasks.vqa.features import grey_batches
from minilora.tasks.vqa.task import BestAnswers, VQAPredictor, open_data, score
from minilora.tasks.weights import restoring
from minilora.training.device import autocast, to_device
from minilora.training.distributed import in_item_order


class VQARun(Run):
    """A trained question answerer."""

    unit: ClassVar[str] = "questions"

    @property
    def predictor(self) -> VQAPredictor:
        return VQAPredictor(self.device, self.config.soft_targets)

    @cached_property
    def vocabulary(self) -> Answers:
        """The answers that are classes."""
        return Answers(self.labels, self.keys)

    def restore(self, weights: str | dict | None) -> tuple[nn.Module, dict]:
        found = moved_weights(self.config, self.base.get("weights"), weights)
        with restoring(found.values()):
            return load_towers(self.config, len(self.labels), found)

    def check(self) -> None:
        super().check()
        _ = self.limit  # UserError for a --max-length that the model cannot have

    @cached_property
    def limit(self) -> int:
        """Of a question, in tokens; a pruned copy of a run asks for it as well."""
        return text_limit(self.model.text.config, self.tokenizer, self.config.max_length)

    @torch.inference_mode()
    def predict(self, pictures: Sequence[Picture], question: str | Sequence[str] = "", top_k: int = 5) -> list:
        """The top_k (answer, probability) of each picture; one question for all, or one each."""
        questions = [question] * len(pictures) if isinstance(question, str) else list(question)
        if len(questions) != len(pictures):
            raise UserError(f"{len(pictures)} pictures but {len(questions)} questions; give one for each")
        if not all(text.strip() for text in questions):
            raise UserError('a question is missing; ask one with --question "...", in a program with question="..."')
        transform, answers = build_transform(self.preprocess), []
        for picture, text in zip(pictures, questions, strict=True):
            images = transform(opened(picture))[None].to(self.device)
            inputs = self.tokenizer([clean_question(text)], max_length=self.limit)
            with autocast(self.device, self.amp):
                logits = self.model(images, *(inputs[name].to(self.device) for name in ("input_ids", "attention_mask")))
            answers.append(top_answers(self.labels, self.predictor.probabilities(logits.float())[0], top_k))
        return answers

    def evaluate(self, options: Any) -> Evaluation:
        options = self.settled(options)
        splits = self.splits(options)
        name, part = choose_part(splits, options.split)
        data = self.dataset(part, options.bad_data)
        batches = grouped_batches(data.picture, options.batch_size)
        loader = vqa_loader(data, batches, None, options.workers)
        found, baselines = self.in_order(loader, batches, options.amp), {}
        if part.answered:
            grey = self.in_order(grey_batches(data, batches), batches, options.amp)
            baselines["this model with every picture greyed out"] = score(grey.answers(part, self.labels), part)
        if part.answered and splits.train is not None and splits.train is not part:
            guess = question_only_guess(splits.train.questions, part.questions)
            baselines["the most frequent answer in training, no model"] = score(guess, part)
        return evaluation(found, part, self.labels, name, data.labels, baselines)

    def in_order(self, loader: Iterable[dict], batches: list[list[int]], amp: str) -> BestAnswers:
        """The answers in the order of the questions."""
        return BestAnswers(*in_item_order(batches, self.predictor.answers(self.model, loader, amp, len(batches))))

    def dataset(self, part: VQAPart, bad_data: str) -> VQADataset:
        texts = Texts(part.questions, self.tokenizer, self.limit)
        return VQADataset(part, texts, self.vocabulary.classes(part.questions), self.preprocess, bad_data=bad_data)

    def splits(self, options: Any) -> VQASplits:
        """The questions of --data-dir, nothing held out; without it the data of the training."""
        return open_data(self.data_config(options, val_split=0.0), require_train=False)

    def batch(self, n: int, options: Any) -> dict[str, Tensor]:
        _, part = choose_part(self.splits(options), options.split)
        data = self.dataset(part, options.bad_data)
        first = np.unique(data.picture, return_index=True)[1]  # one question for each picture
        numbers = [int(first[i % len(first)]) for i in range(n)]
        (batch,) = vqa_loader(data, [numbers], None)
        self.asked = [part.questions[i] for i in numbers]
        return to_device(batch, self.device)

    def pictures(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["image"][batch["image_index"]]

    def titles(self, batch: dict[str, Tensor]) -> list[str]:
        return [question.text for question in self.asked]

    def captions(self, batch: dict[str, Tensor]) -> list[str]:
        return [f"{question.text} ({question.answer})" for question in self.asked]


load = VQARun.load


def evaluation(
    found: BestAnswers, part: VQAPart, labels: Sequence[str], name: str, classes: np.ndarray, baselines: dict[str, dict]
) -> Evaluation:
    """Scores, table rows and pictures for the report from a model's answers; baselines: the scores
    of others. classes (N,): the truth, -1 unknown."""
    said = found.answers(part, labels)
    paths = (part.pictures[q.picture].path for q in part.questions)
    header, rows = top_table(paths, labels, found.classes, found.probabilities)
    header += ["question_id", "question"]
    rows = [[*row, q.question_id, q.text] for row, q in zip(rows, part.questions, strict=True)]
    table = header, rows, (["question_id", "answer"], [[number, answer] for number, answer in said.items()])
    if not part.answered:
        return Evaluation(None, f"{len(rows)} questions without answers", *table, results=said, part=name)
    scores = score(said, part)
    truth = [labels[k] if k >= 0 else q.answer for q, k in zip(part.questions, classes, strict=True)]
    metrics = classification_metrics(truth, [said[q.question_id] for q in part.questions])
    compared = {"the model": scores} | {f"baseline: {name}": one for name, one in baselines.items()}
    lines = [
        format_vqa(scores),
        f"against the most common answer, as classes: {weighted_line(metrics)}",
        f"out of the vocabulary: {int((classes < 0).sum())} of {len(rows)} answers, counted as wrong",
        text_table(
            ["beside it, on the same questions", "accuracy %"],
            [[name, f"{one['overall']:.2f}"] for name, one in compared.items()],
        ),
    ]
    loss = found.mean_loss()
    summary = {"accuracy": scores["accuracy"], "loss": None if np.isnan(loss) else loss}
    worth = np.array([scores["per_question"][q.question_id] for q in part.questions])

    def examples(numbers: Sequence[int]) -> list[Example]:
        shown = []
        for i in numbers:
            q, image = part.questions[i], None
            with suppress(UserError):  # a picture that cannot be opened
                image = part.pictures.load(q.picture)
            answer = truth[i], said[q.question_id], float(found.probabilities[i, 0])
            text = {"question": q.text, "name": part.pictures[q.picture].path, "correct": bool(worth[i] >= 0.5)}
            shown.append(Example(image, *answer, **text))
        return shown

    wrong = np.flatnonzero(worth < 0.5)
    gap = found.probabilities[:, 0] - found.probabilities[:, min(1, found.probabilities.shape[1] - 1)]
    spread = np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)
    return Evaluation(
        summary | {key: metrics[key] for key in ("precision", "recall", "f1")},
        "\n".join(lines),
        *table,
        vqa=scores | {"question_only": {name: one["overall"] for name, one in baselines.items()}},
        baselines={name: one["accuracy"] for name, one in baselines.items()},
        answer_histogram=Counter(truth).most_common(),
        mistakes=examples(wrong[np.argsort(-found.probabilities[wrong, 0], kind="stable")][:SHOWN]),
        unsure=examples(np.argsort(gap, kind="stable")[:SHOWN]),
        examples=examples(spread),
        results=said,
        part=name,
    )


def zero_shot(config: Config, options: Any, device: torch.device) -> str:
    """A base model has no answers to give."""
    raise UserError("--task vqa: a base model knows no answers before training; run train.py --task vqa first")
