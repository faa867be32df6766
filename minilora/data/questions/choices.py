"""What a multiple choice is: a picture, a question and 2 to 26 choices in the order shown.

A picture is shared by its questions, and a split by pictures never divides them. The door to such
questions is data/choice_sets.py, the readers of their files are visual7w and choice_csv.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from minilora.data.pictures.folder import Split
from minilora.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Question(NamedTuple):
    """One question about one picture, with its choices in the order in which they are shown."""

    id: int | str
    picture: int  # number in the split's pictures
    question: str
    choices: tuple[str, ...]  # as they are shown
    answer: int = -1  # place of the right one, -1 = unknown
    kind: str = ""  # type of the question


class ChoiceSplit(Sequence):
    """Questions and the pictures they are about. `load(i)` opens the picture of question i."""

    def __init__(self, questions: Iterable[Question], pictures: Split):
        self.questions, self.pictures = list(questions), pictures

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, i: int) -> Question:
        return self.questions[i]

    def load(self, i: int) -> Image.Image:
        """The picture of question i as RGB; BadImage where it cannot be opened."""
        return self.pictures.load(self.questions[i].picture)

    def path(self, i: int) -> str:
        """Its file, relative to the data folder."""
        return self.pictures[self.questions[i].picture].path

    def take(self, indices: Iterable[int]) -> ChoiceSplit:
        """The questions at `indices`, in that order, with the same pictures."""
        return ChoiceSplit((self.questions[i] for i in indices), self.pictures)


@dataclass
class ChoiceSplits:
    """train / val / test or None; `source`: the format; `whole`: all of a set without parts."""

    train: ChoiceSplit | None
    val: ChoiceSplit | None
    test: ChoiceSplit | None
    source: str
    whole: ChoiceSplit | None = None


def check_choices(choices: Sequence[str], where: str) -> None:
    """UserError unless there are 2 to 26 choices, none empty."""
    if not 2 <= len(choices) <= len(LETTERS):
        n = len(choices)
        raise UserError(f"{where}: {n} choice{'s' * (n != 1)}; a question needs 2 to {len(LETTERS)}")
    for letter, choice in zip(LETTERS, choices, strict=False):
        if not choice.strip():
            raise UserError(f"{where}: choice {letter} is empty; every choice needs a text")
