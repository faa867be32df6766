"""Training rows without labels beside labelled ones: --distill-unlabelled, a teacher answers them.

The training part is the labelled rows and, numbered after them, the unlabelled ones. Labels that
lie beside these are not read. Of a set in parts only the training part is taken, and no row that
this run has itself: validation and test stay new to the student.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

from minilora.data.pictures.folder import Sample, Split, Splits, has_class_folders, refuse_missing
from minilora.data.pictures.loader import epoch_order, mix
from minilora.data.pictures.parts import list_pictures
from minilora.data.pictures.tables import is_labelled, list_tables
from minilora.data.questions.vqa2 import VQAPart, find_files, read_part
from minilora.data.sets import loose_part, parts_of, unlabelled
from minilora.data.shards.files import is_shards
from minilora.data.shards.pictures import read_picture_shards
from minilora.data.shards.questions import read_shards
from minilora.data.vqa_sets import VQASplits
from minilora.errors import UserError


class Joined(Sequence):
    """The labelled pictures, then the unlabelled: files both, or shards both."""

    def __init__(self, labelled: Sequence, more: Sequence):
        self.parts, self.first = (labelled, more), len(labelled)
        self.prepared, self.index = is_prepared(labelled), getattr(labelled, "index", None)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def ask(self, method: str, i: int, *more: Any) -> Any:
        """What the part that holds picture i says of it."""
        part, k = (self.parts[0], i) if i < self.first else (self.parts[1], i - self.first)
        return getattr(part, method)(k, *more)

    __getitem__, load = partialmethod(ask, "__getitem__"), partialmethod(ask, "load")
    pixels, size = partialmethod(ask, "pixels"), partialmethod(ask, "size")


def is_prepared(pictures: Sequence) -> bool:
    """Whether pictures come from shards, in the model's size."""
    return getattr(pictures, "prepared", False)


def add_unlabelled(splits: Splits | VQASplits, directory: str | None, bad_data: str = "error") -> None:
    """`splits.unlabelled` from a folder, a table, files of VQA v2 or shards; None without a
    `directory`. A note says what was taken; UserError where that is nothing."""
    if directory is None:
        return
    read = read_questions if isinstance(splits, VQASplits) else read_pictures
    try:
        if not os.path.exists(directory):
            raise UserError(f"{directory}: no such folder or file")
        where, more, answered = read(Path(directory), bad_data)
        own = {item for part in (splits.train, splits.val, splits.test) if part for item in items(part)}
        found = items(more)
        rows = [i for i, item in enumerate(found) if item not in own]
        if not rows:
            why = f"all {len(found)} are in this run's own data" if found else "nothing is there"
            raise UserError(f"{where}: no unlabelled row; {why}")
        if made(splits.train) != made(more):
            raise UserError(f"{where}: files and shards do not mix, nor shards made in two ways; give two alike")
    except UserError as error:
        raise UserError(f"--distill-unlabelled: {error}") from None
    line, left = f"{len(rows):,} rows of {where}", len(found) - len(rows)
    line += "; the labels there are not read" * answered
    line += f"; {left:,} more left out, which this run's own data have" * (left > 0)
    splits.notes += [f"unlabelled: {note}" for note in (line, *more.notes)]
    splits.unlabelled = more.take(rows)


def read_pictures(path: Path, bad_data: str) -> tuple[Path, Split, bool]:
    """(where they are, pictures with label -1, whether they have labels)."""
    if is_shards(path):
        stored = read_picture_shards(path)
        split = stored.train or stored.val or stored.test or Split((), path)
        answered = any(sample.label >= 0 for sample in split)
        split.samples = [Sample(sample.path) for sample in split]
        return path, split, answered
    if path.is_dir():
        path = parts_of(path).get("train") or loose_part(path, "train") or path
    split = unlabelled(path)
    if path.is_dir():
        return path, split, has_class_folders(path) or any(map(is_labelled, list_tables(path)))
    if bad_data == "error":
        refuse_missing((sample.path for sample in split), split.root, "correct the table, or use --bad-data skip")
    return path, split, is_labelled(path)


def read_questions(path: Path, bad_data: str) -> tuple[Path, VQAPart, bool]:
    """(where they are, questions without answers, whether they have answers)."""
    if is_shards(path):
        parts, _ = read_shards(path)
        part = parts.get("train") or next(iter(parts.values()), VQAPart([], []))
        answered = any(question.answers for question in part.questions)
    else:
        asked = find_files(path)
        name = "train" if "train" in asked else next(iter(asked))
        where, answers = asked[name]
        part, answered = read_part(path, name, where, None, list_pictures(path), bad_data), answers is not None
        path = where
    bare = [replace(question, answers=(), answer="", tokens=None) for question in part.questions]
    return path, VQAPart(bare, part.pictures, part.notes), answered


def items(part: Split | VQAPart) -> list[tuple[str, str]]:
    """(path of the picture, words of the question) of each row."""
    pictures = getattr(part, "pictures", part)
    root = os.path.realpath(getattr(pictures, "root", ""))
    paths = [os.path.join(root, pictures[i].path) for i in range(len(pictures))]
    return [(paths[q.picture], q.text) for q in part.questions] if pictures is not part else [(p, "") for p in paths]


def made(part: Split | VQAPart) -> tuple | None:
    """What stored pictures must share to stand in one batch; None for files."""
    pictures = getattr(part, "pictures", part)
    return (pictures.index["preprocess"], pictures.index["made"].get("wide")) if is_prepared(pictures) else None


def joined(splits: Splits | VQASplits) -> Sequence | VQAPart:
    """The training part, rows without a label last."""
    part, more = splits.train, splits.unlabelled
    if more is None or isinstance(part, Split):
        return Joined(part, more) if more else part
    moved = [replace(question, picture=question.picture + len(part.pictures)) for question in more.questions]
    return VQAPart(part.questions + moved, Joined(part.pictures, more.pictures))


def mixed_counts(size: int, share: float) -> tuple[int, int]:
    """(labelled, unlabelled) rows of a step of `size` rows, at least one of each."""
    if size < 2:
        raise UserError("--distill-unlabelled: --batch-size 1 has no room for a row of each kind; use at least 2")
    more = min(max(round(size * share), 1), size - 1)
    return size - more, more


def mixed_batches(
    cut: Callable[[int], list[list[int]]], labelled: int, more: int, counts: tuple[int, int], seed: int, epoch: int
) -> list[list[int]]:
    """An epoch of L labelled and U = `more` unlabelled rows, counts = (l, u) of them in a batch:
    the unlabelled ones once, labelled ones beside them.

    cut(u): the unlabelled rows, numbered from 0, in batches of u. The labelled ones come from an
    endless sequence of shuffles, in which an epoch continues where the last one ended: over a run
    all are seen equally often. Number p (L + U) + i is row i in the p-th shuffle of the epoch, and
    is augmented anew. Both kinds are spread evenly over a batch, and so over its microbatches.
    """

    def due(unlabelled: int) -> int:
        """Labelled rows beside so many unlabelled ones."""
        return -(-unlabelled * counts[0] // counts[1])  # rounded up

    first, skipped = divmod(epoch * due(more), labelled)
    known: list[int] = []
    while len(known) < skipped + due(more):
        turn = len(known) // labelled
        shuffle = epoch_order(labelled, labelled, mix(seed, 1), first + turn)[0]
        known += [turn * (labelled + more) + row for row in shuffle]
    batches, done = [], 0
    for rows in cut(counts[1]):
        beside = known[skipped + due(done) : skipped + due(done + len(rows))]
        places = [(k + 0.5) / len(kind) for kind in (beside, rows) for k in range(len(kind))]
        numbers = beside + [labelled + row for row in rows]
        batches.append([number for _, number in sorted(zip(places, numbers, strict=True))])
        done += len(rows)
    return batches
