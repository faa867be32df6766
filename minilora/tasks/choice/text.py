"""A question with its choices as token ids.

text_c = prompt with {question} and {choice} filled in, for every choice c
"""

from collections.abc import Sequence

from minilora.data.questions.choice_batches import Tokens
from minilora.data.questions.choices import ChoiceSplit
from minilora.errors import UserError
from minilora.settings.flags import Config
from reference_models.text.tokenizers import Tokenizer

PROMPT = "Question: {question} Answer: {choice}"


class ChoicePrompt:
    """Questions with their choices -> token ids by one prompt. `cut` counts the questions
    that were too long."""

    def __init__(self, tokenizer: Tokenizer, config: Config, context: int):
        self.tokenizer, self.prompt = tokenizer, config.prompt or PROMPT
        self.limit = config.max_length or (context if tokenizer.fill else min(tokenizer.max_length, context))
        if self.limit > context or (tokenizer.fill and self.limit < context):
            most = "all its texts have so many, leave it out" if tokenizer.fill else "use at most that"
            raise UserError(f"--max-length {self.limit}: this model has positions for {context} tokens; {most}")
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
