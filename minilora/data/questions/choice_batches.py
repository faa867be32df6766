"""From questions to batches: the choices' texts as token ids, made once; pictures as they come.

A picture that several questions of a batch are about is in the batch once.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minilora.data.pictures.loader import PictureTensors
from minilora.data.questions.choices import ChoiceSplit

# Sharing the choices' beginning is faster where it leaves at most this share of the tokens.
WORTH_SHARING = 0.75


class Tokens:
    """Ragged token ids of N questions with C choices each; `tokens[i]` is a list of C rows."""

    def __init__(self, rows: Sequence[Sequence[int]], choices: int):
        self.choices = choices
        self.starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        self.flat = np.fromiter((i for row in rows for i in row), np.int32, self.starts[-1])

    def __getitem__(self, i: int) -> list[np.ndarray]:
        first = i * self.choices
        return [self.flat[self.starts[k] : self.starts[k + 1]] for k in range(first, first + self.choices)]


class ChoiceDataset(PictureTensors):
    """`dataset[i]` is question i, `dataset[(epoch, i)]` with its picture augmented for that epoch.

    An item: image (3, S, S) float32 normalised, tokens (C rows), label (place of the right choice,
    -1 unknown), index, picture, valid.
    """

    def __init__(
        self,
        split: ChoiceSplit,
        tokens: Tokens,
        preprocess: dict,
        augment: str = "none",
        seed: int = 0,
        bad_data: str = "error",
    ):
        super().__init__(split.pictures, preprocess, augment, seed, bad_data)
        self.split, self.tokens = split, tokens
        # neighbours often ask about the same picture
        self.last: tuple[object, tuple[Tensor, bool] | None] = (None, None)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, i = key if isinstance(key, tuple) else (None, key)
        question = self.split[i]
        # by picture: its questions see the same crop
        if self.last[0] != (epoch, question.picture):
            self.last = (epoch, question.picture), self.image(question.picture, epoch)
        image, valid = self.last[1]
        return {
            "image": image,
            "tokens": self.tokens[i],
            "label": question.answer,
            "index": i,
            "picture": question.picture,
            "valid": valid,
        }


def collate_choices(items: Sequence[dict], pad_id: int) -> dict:
    """Items -> batch. B questions, U different pictures, C choices, T tokens of the longest text.

    image (U, 3, S, S), picture (B,) rows of image, input_ids (B, C, T), attention_mask (B, C, T) 1
    for a token and 0 for padding, label, index (B,) int64, valid (B,) bool, share: whether it pays
    to encode what a question's choices have in common once, packed_length: shared_size of the
    batch, which a GPU could only tell by making the host wait.
    """
    rows: dict[int, int] = {}
    for item in items:
        rows.setdefault(item["picture"], len(rows))
    images = {item["picture"]: item["image"] for item in items}
    texts = [item["tokens"] for item in items]
    ids = np.full((len(texts), len(texts[0]), max(len(t) for text in texts for t in text)), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for b, text in enumerate(texts):
        for c, tokens in enumerate(text):
            ids[b, c, : len(tokens)], mask[b, c, : len(tokens)] = tokens, 1
    packed = shared_size(texts)
    return {
        "image": torch.stack([images[number] for number in rows]),
        "picture": torch.tensor([rows[item["picture"]] for item in items]),
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "share": packed <= WORTH_SHARING * ids[0].size,
        "packed_length": packed,
        **{key: torch.tensor([item[key] for item in items]) for key in ("label", "index", "valid")},
    }


def shared_size(texts: Sequence[Sequence[np.ndarray]]) -> int:
    """Tokens of the largest question when its choices' common beginning is written once."""
    largest = 0
    for text in texts:
        short = min(len(tokens) for tokens in text) - 1  # the end token stands apart
        heads = np.stack([tokens[:short] for tokens in text])
        common = int((heads == heads[0]).all(0).cumprod().sum())
        largest = max(largest, common + sum(len(tokens) - common for tokens in text))
    return largest


def choice_collate(pad_id: int) -> Callable[[Sequence[dict]], dict]:
    """`collate_choices` for one tokenizer, fit to be sent to a worker."""
    return partial(collate_choices, pad_id=pad_id)
