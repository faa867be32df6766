"""--soft-targets: learn from all ten people, each answer as the accuracy that it would get."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from minilora.data.questions.vqa2 import Question
from minilora.data.vqa_sets import Answers
from minilora.report.vqa_metric import ANSWERS, leave_one_out


class SoftTargets:
    """Targets (B, K) in 0..1: 0, .3, .6, .9, 1 for k of ten equal answers; 1 where a
    question has one answer."""

    def __init__(self, answers: Answers):
        self.answers = answers

    def any(self, question: Question) -> bool:
        """Whether one of the question's answers is a class."""
        return any(self.answers.of(answer) >= 0 for answer in set(question.answers))

    def of(self, question: Question) -> dict[int, float]:
        """{class: target} of one question; spellings of one answer count together."""
        counts = Counter(self.answers.of(answer) for answer in question.answers)
        if len(question.answers) < ANSWERS:
            return {self.answers.of(question.answer): 1.0} if question.answer else {}
        return {k: leave_one_out(n, len(question.answers)) for k, n in counts.items()}

    def added(self, batches: Iterable[dict], questions: Sequence[Question]) -> Iterator[dict]:
        """The batches with `target` (B, K) float32."""
        for batch in batches:
            yield batch | {"target": self.target([questions[i] for i in batch["index"].tolist()])}

    def target(self, questions: Sequence[Question]) -> Tensor:
        target = torch.zeros(len(questions), len(self.answers.labels))
        for row, question in enumerate(questions):
            for k, value in self.of(question).items():
                if k >= 0:
                    target[row, k] = value
        return target
