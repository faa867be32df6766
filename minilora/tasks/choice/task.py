"""Multiple choice with CLIP: the picture is compared with one sentence for each choice.

v   = normalise(visual_projection(vision(picture)))               (B, e)
t_c = normalise(text_projection(text(sentence of choice c)))      (B, C, e)
logits_c = exp(logit_scale) * v . t_c + logit_bias                (B, C)
loss = cross entropy with label smoothing over the choices of a question; of a model with logit_bias
       - sum_c log sigmoid(+- logits_c), + for the right choice, as SigLIP is trained

The sentence of choice c is the prompt with {question} and {choice} filled in.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.data.choice_sets import load_choices
from minilora.data.pictures.loader import make_loader
from minilora.data.questions.choice_batches import ChoiceDataset, Tokens, choice_collate
from minilora.data.questions.choices import LETTERS, ChoiceSplit, ChoiceSplits
from minilora.settings.flags import NANO_CLIP_LR, Config
from minilora.tasks.clip import cosine_logits, load_clip, trained_heads
from minilora.tasks.labelled import Labelled, LabelledPredictor, Predictions
from minilora.tasks.method import make_trainable, resolve
from minilora.tasks.teacher import teacher_names
from minilora.tasks.towers import text_limit
from reference_models.text.tokenizers import Tokenizer

DEFAULT_MODEL = "clip-nano"
PROMPT = "Question: {question} Answer: {choice}"
# encode what a question's choices share once; None: where that is faster
share_prefix: bool | None = None


def open_data(config: Config, require_train: bool = True) -> ChoiceSplits:
    """The questions of --data-dir, or the generated ones."""
    cut, check = (config.val_split, config.subset, config.seed), config.bad_data == "error"
    return load_choices(config.data_dir, config.data_format, *cut, check, require_train)


class ChoicePrompt:
    """Questions with their choices -> token ids by one prompt, for a model of the configuration
    `clip`; cut: how many were too long."""

    def __init__(self, tokenizer: Tokenizer, config: Config, clip: Any):
        self.tokenizer, self.prompt = tokenizer, config.prompt or PROMPT
        self.limit = text_limit(clip, tokenizer, config.max_length)
        self.cut = 0

    def __call__(self, question: str, choices: Sequence[str]) -> list[list[int]]:
        """One row of ids for each choice. Of a text that is too long the question loses its last
        words, not the choice: the end of the text is what the choices differ in."""
        words, tried = question.split(), self._rows(question, choices)
        self.cut += max(map(len, tried)) > self.limit
        while max(map(len, tried)) > self.limit and words:
            words = words[: -max(1, (max(map(len, tried)) - self.limit) // 4)]
            tried = self._rows(" ".join(words), choices)
        # a choice that is too long by itself is cut before the end token
        return [row if len(row) <= self.limit else [*row[: self.limit - 1], row[-1]] for row in tried]

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


class ChoicePredictor(LabelledPredictor):
    """One distribution over the choices of each question. pairwise: the loss takes every choice by
    itself, right or wrong, as SigLIP's does."""

    pairwise = False

    def loss(self, logits: Tensor, batch: dict, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        total, correct, counts = super().loss(logits, batch, smoothing)
        if self.pairwise:
            right = F.one_hot(batch["label"].clamp(min=0), logits.shape[1]).to(logits)  # (B, C)
            wanted = (1 - smoothing) * right + smoothing / logits.shape[1]
            terms = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")  # (B, C)
            total = terms.sum(1).where(counts, 0.0).sum()
        return total, correct, counts

    def logits(self, model: nn.Module, batch: dict) -> Tensor:
        if "text_features" in batch:
            pooled, texts = batch["image_features"], batch["text_features"]
        else:
            pooled, texts = model.vision.pooled(batch["image"])[batch["picture"]], pooled_texts(model, batch)
        return cosine_logits(model, model.visual_projection(pooled), model.text_projection(texts))


def pooled_texts(model: nn.Module, batch: dict) -> Tensor:
    """input_ids (B, C, T) -> the text tower's vectors (B, C, d). Where a token sees only those
    before it, what a question's choices share can be encoded once."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if getattr(model.text.config, "text_causal", False) and (batch["share"] if share_prefix is None else share_prefix):
        return model.text.pooled_choices(ids, batch.get("packed_length"))
    return model.pooled_text(ids.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, ids.shape[:2])


def accuracy_by_type(found: Predictions, split: ChoiceSplit) -> dict[str, float]:
    """{type of question: share of right answers} of the scored rows; {} where no types are."""
    rows: dict[str, list[bool]] = {}
    right = found.probabilities.argmax(1) == found.labels
    for i in np.flatnonzero(found.scored):
        rows.setdefault(split[i].kind, []).append(bool(right[i]))
    return {kind: sum(r) / len(r) for kind, r in sorted(rows.items())} if set(rows) - {""} else {}


class Choice(Labelled):
    """Multiple choice, see Task."""

    unit = "questions"

    def __init__(self, config: Config, device: str | torch.device = "cpu"):
        """The data come first: a wrong folder is reported at once."""
        if config.mode == "lora" and config.model in (None, DEFAULT_MODEL):
            config.lr = config.lr or NANO_CLIP_LR
        resolve(config, DEFAULT_MODEL)
        splits = open_data(config)
        self.labels = self.keys = list(LETTERS[: len(splits.train[0].choices)])
        teacher_names(config, self.keys)
        model, record, self.tokenizer = load_clip(config)
        make_trainable(model, config, trained_heads(model, config))
        super().__init__(config, model, record, splits, ChoicePredictor(device))
        self.predictor.pairwise = model.logit_bias is not None
        self.prompt = ChoicePrompt(self.tokenizer, config, model.config)
        parts = {"train": splits.train, "val": splits.val, "test": splits.test}
        self.data = {name: self.dataset(split, name) for name, split in parts.items() if split is not None}

    def dataset(self, split: ChoiceSplit, part: str) -> ChoiceDataset:
        augment = self.config.augment if part == "train" else "none"
        tokens = self.prompt.of_split(split)
        return ChoiceDataset(split, tokens, self.preprocess, augment, self.config.seed, self.config.bad_data)

    def read(self, part: str, batches: Sequence[Sequence]) -> Iterable[dict]:
        return make_loader(self.data[part], batches, self.workers, choice_collate(self.tokenizer.pad_id))

    def encoded(self, batch: dict) -> dict[str, Tensor]:
        ids = batch | {key: batch[key].to(self.device) for key in ("input_ids", "attention_mask")}
        image = self.model.vision.pooled(batch["image"].to(self.device))[batch["picture"].to(self.device)]
        # (B, d), (B, C, d)
        return {"image_features": image, "text_features": pooled_texts(self.model, ids)}

    def answered(self, part: str) -> bool:
        return any(question.answer >= 0 for question in self.data[part].split)

    def scores(self, found: Predictions, part: str) -> dict[str, float]:
        by_type = accuracy_by_type(found, self.data[part].split)
        return found.scores() | {f"accuracy/{kind}": value for kind, value in by_type.items()}

    def file_of(self, row: int, part: str = "train") -> str:
        return self.data[part].split.path(row)

    def data_lines(self) -> list[str]:
        where = self.config.data_dir or "generated shapes"
        counts = ", ".join(f"{len(data)} {part}" for part, data in self.data.items())
        return [f"data: {where}: {counts} questions with {len(self.labels)} choices", *self.prompt.note()]


build = Choice
