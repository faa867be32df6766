"""The text side of multiple choice: where the tokenizer is, and a question with its
choices as token ids.

text_c = prompt with {question} and {choice} filled in, for every choice c
"""

import os
from collections.abc import Sequence

from torch import nn

from minilora.data.questions.choice_batches import Tokens
from minilora.data.questions.choices import ChoiceSplit
from minilora.errors import UserError
from minilora.settings.flags import Config
from minilora.tasks import base
from minilora.tasks.vqa.model import beside
from reference_models.load import bundled_weights, config_for
from reference_models.text.tokenizers import Tokenizer, load_tokenizer

PROMPT = "Question: {question} Answer: {choice}"


def _is_clip(model: str) -> None:
    """UserError for the name of a model that reads no texts, so that nobody looks for a
    tokenizer of it."""
    if not os.path.isdir(model) and config_for(model).family != "clip":
        raise UserError(f"--model {model} is no CLIP; --task choice needs one, such as clip-nano or clip-vit-b-32")


def find_tokenizer(config: Config) -> Tokenizer:
    """--tokenizer, else what lies beside the weights; UserError where there is none."""
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    name, source = base.one_value(config, "model"), base.one_value(config, "weights")
    if source in (None, base.BUNDLED, base.RANDOM):
        source = name if os.path.isdir(name) else bundled_weights(name)
    folder = beside(source)
    if folder is None:
        _is_clip(name)
        where = f"beside {source}" if source else f"bundled for {name}"
        raise UserError(f"--tokenizer is missing, and there is none {where}: name its file or folder")
    return load_tokenizer(folder)


def text_sizes(name: str, weights: str | None, tokenizer: Tokenizer) -> dict[str, int]:
    """Settings of a text tower with random weights, so that it fits the tokenizer; {} for a
    tower with weights."""
    if weights != base.RANDOM or not name.startswith("clip-"):
        return {}
    return {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id}


def check_tokenizer(model: nn.Module, tokenizer: Tokenizer) -> None:
    """UserError where model and tokenizer do not belong together: more ids than rows, or
    another end token."""
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"--tokenizer has {tokenizer.vocab_size} tokens, {config.name} knows {config.vocab_size}; it belongs to "
            "another model"
        )
    legacy = config.eos_token_id == 2
    if tokenizer.eos_id != (tokenizer.vocab_size - 1 if legacy else config.eos_token_id):
        wanted = "its last token" if legacy else config.eos_token_id
        raise UserError(
            f"--tokenizer ends texts with token {tokenizer.eos_id}, {config.name} looks for {wanted}; it belongs to "
            "another model"
        )


class Texts:
    """Questions with their choices -> token ids by one prompt. `cut` counts the questions
    that were too long."""

    def __init__(self, tokenizer: Tokenizer, config: Config, context: int):
        self.tokenizer, self.prompt = tokenizer, config.prompt or PROMPT
        self.limit = config.max_length or min(tokenizer.max_length, context)
        if self.limit > context:
            raise UserError(
                f"--max-length {self.limit}: this model has positions for {context} tokens; use at most that"
            )
        self.cut = 0

    def __call__(self, question: str, choices: Sequence[str]) -> list[list[int]]:
        """One row of ids for each choice. Of a text that is too long the question loses its last
        words, not the choice: the end of the text is what the choices differ in."""
        words, tried = question.split(), self._rows(question, choices)
        self.cut += max(map(len, tried)) > self.limit
        while max(map(len, tried)) > self.limit and words:
            words = words[: -max(1, (max(map(len, tried)) - self.limit) // 4)]
            tried = self._rows(" ".join(words), choices)
        return [self._fit(row) for row in tried]

    def of_split(self, split: ChoiceSplit) -> Tokens:
        """All texts of a split."""
        rows = [row for q in split for row in self(q.question, q.choices)]
        return Tokens(rows, len(split[0].choices))

    def note(self) -> list[str]:
        """The one warning about texts that were too long, [] where none was."""
        if not self.cut:
            return []
        many = f"{self.cut} questions are" if self.cut > 1 else "1 question is"
        return [f"warning: {many} longer than {self.limit} tokens with the choices; the end of the question was cut"]

    def _rows(self, question: str, choices: Sequence[str]) -> list[list[int]]:
        filled = self.prompt.replace("{question}", question)
        return [self.tokenizer.encode(filled.replace("{choice}", choice)) for choice in choices]

    def _fit(self, row: list[int]) -> list[int]:
        """A choice that is too long by itself is cut before the end token."""
        return row if len(row) <= self.limit else [*row[: self.limit - 1], row[-1]]
