"""Batches of questions in which no picture and no text stands twice.

    image (P, 3, S, S)   image_index (B,)      question b is about picture image_index[b]
    input_ids (U, T)     text_index (B,)       and asks text text_index[b]; attention_mask (U, T)
    label (B,)           index (B,)  valid (B,)   class or -1, its number, picture readable

B questions, P <= B pictures, U <= B texts. A model may so encode each picture and each text once:
the same numbers for less work. Everything random is a function of (seed, epoch, picture) alone.
"""

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from minilora.data.pictures.loader import PictureTensors, make_loader, mix
from minilora.data.questions.vqa2 import Question, VQAPart

BUCKET = 50  # batches whose questions are sorted by length together


class Texts:
    """The distinct texts of N questions as unpadded token ids; `row[i]`: the text of question i."""

    def __init__(self, questions: Sequence[Question], tokenizer: Callable[..., dict], max_length: int | None):
        number: dict[str, int] = {}
        rows = [number.setdefault(question.text, len(number)) for question in questions]
        self.row, self.pad = np.array(rows, dtype=np.int64), tokenizer.pad_id
        stored = {row: question.tokens for row, question in zip(rows, questions, strict=True)}
        if None not in stored.values():  # from shards
            self.ids = [np.frombuffer(stored[row], dtype=np.int32) for row in range(len(number))]
            return
        distinct, self.ids = list(number), []
        for start in range(0, len(distinct), 1024):
            some = tokenizer(distinct[start : start + 1024], max_length=max_length)
            lengths = some["attention_mask"].sum(1).tolist()
            rows = some["input_ids"].to(torch.int32).numpy()
            self.ids += [row[:length].copy() for row, length in zip(rows, lengths, strict=True)]

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each question."""
        return np.array([len(ids) for ids in self.ids])[self.row]

    def padded(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """input_ids and attention_mask (U, T) of some texts, padded to the longest of them."""
        width = max(len(self.ids[row]) for row in rows)
        ids = torch.full((len(rows), width), self.pad, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for k, row in enumerate(rows):
            ids[k, : len(self.ids[row])] = torch.from_numpy(self.ids[row].astype(np.int64))
            mask[k, : len(self.ids[row])] = 1
        return {"input_ids": ids, "attention_mask": mask}


class VQADataset(PictureTensors):
    """A part with its tokens and labels; `dataset[(epoch, numbers)]`: the batch of these questions,
    number p N + i being question i once more, its picture augmented anew.

    epoch None: no augmentation. A broken or missing picture raises BadImage (bad_data "error") or
    becomes grey, with its questions not valid.
    """

    def __init__(
        self,
        part: VQAPart,
        texts: Texts,
        labels: np.ndarray,
        preprocess: dict,
        augment: str = "none",
        seed: int = 0,
        bad_data: str = "error",
    ):
        super().__init__(part.pictures, preprocess, augment, seed, bad_data)
        self.part, self.texts, self.labels = part, texts, labels
        self.picture = np.array([question.picture for question in part.questions], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int | None, Sequence[int]]) -> dict[str, Tensor]:
        epoch, numbers = key
        turn, numbers = np.divmod(np.asarray(numbers, dtype=np.int64), len(self))
        shown, image_index = distinct(self.picture[numbers] + turn * len(self.part.pictures))
        images, readable = zip(*(self.image(j, epoch) for j in shown.tolist()), strict=True)
        return self.without_images(numbers, shown, image_index) | {
            "image": torch.stack(images),
            "valid": torch.tensor(readable)[torch.from_numpy(image_index)],
        }

    def without_images(self, numbers: np.ndarray, shown: np.ndarray, image_index: np.ndarray) -> dict[str, Tensor]:
        """Texts and labels of a batch; picture (P,) are the numbers of its pictures."""
        rows, text_index = distinct(self.texts.row[numbers])
        return {
            "picture": torch.from_numpy(shown),
            "image_index": torch.from_numpy(image_index),
            "text": torch.from_numpy(rows),
            "text_index": torch.from_numpy(text_index),
            **self.texts.padded(rows),
            "label": torch.from_numpy(self.labels[numbers]),
            "index": torch.from_numpy(numbers),
        }


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the different values in order of appearance, for each value its place among them)."""
    place: dict[int, int] = {}
    index = np.array([place.setdefault(value, len(place)) for value in values.tolist()], dtype=np.int64)
    return np.array(list(place), dtype=np.int64), index


def vqa_loader(
    dataset: VQADataset, batches: Sequence[Sequence[int]], epoch: int | None, workers: int = 0
) -> Iterator[dict]:
    """The batches of these questions, in order; make_loader with one key for each batch."""
    keys = [[(epoch, list(batch))] for batch in batches]
    return make_loader(dataset, keys, workers, itemgetter(0))


def grouped_batches(picture: np.ndarray, batch_size: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Batches of at most batch_size questions in which each picture's questions stand together.

    picture (N,) is the picture of each question; `order`: the pictures' order, else that of the
    questions. Only a picture with more than batch_size questions makes a larger batch: a picture is
    never encoded twice.
    """
    questions: dict[int, list[int]] = {}
    for i, j in enumerate(picture.tolist()):
        questions.setdefault(j, []).append(i)
    batches: list[list[int]] = []
    for j in order if order is not None else questions:
        if not batches or len(batches[-1]) + len(questions[j]) > batch_size:
            batches.append([])
        batches[-1] += questions[j]
    return batches


def shuffled_groups(picture: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """grouped_batches with the pictures in the order of (seed, epoch)."""
    shown = distinct(picture)[0]
    drawn = torch.randperm(len(shown), generator=torch.Generator().manual_seed(mix(seed, epoch)))
    return grouped_batches(picture, batch_size, shown[drawn.numpy()].tolist())


def bucketed_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All questions shuffled by (seed, epoch); batches of nearly equal lengths, in random order.

    Of every BUCKET * batch_size in the shuffle, questions of similar length share a batch.
    """
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    order = torch.randperm(len(lengths), generator=generator).numpy()
    batches = []
    for start in range(0, len(order), BUCKET * batch_size):
        some = order[start : start + BUCKET * batch_size]
        some = some[np.argsort(lengths[some], kind="stable")]
        batches += [some[i : i + batch_size].tolist() for i in range(0, len(some), batch_size)]
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]
