"""The one door to labelled pictures: folders, tables, shards and generated shapes become Splits."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from minilora.data.generated.shapes import classification_splits
from minilora.data.pictures.folder import Sample, Split, Splits, has_class_folders, parts_below, read_folders
from minilora.data.pictures.label_sets import recoded, strata
from minilora.data.pictures.parts import LeftOut, entries, existing_path, find_parts, is_folder, list_pictures, nfc
from minilora.data.pictures.tables import TABLES, is_labelled, list_tables, read_tables, read_unlabelled
from minilora.data.questions.visual7w import FILE as VISUAL7W
from minilora.data.questions.vqa2 import has_questions
from minilora.data.shards.files import is_shards
from minilora.data.shards.pictures import read_picture_shards
from minilora.errors import UserError

FORMATS = ("auto", "folder", "csv", "shapes", "shards")


def load_classification(
    data_dir: str | os.PathLike | None,
    fmt: str = "auto",
    val_split: float = 0.1,
    subset: float = 1.0,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    check_files: bool = True,
    require_train: bool = True,
    several: bool = False,
) -> Splits:
    """The labelled pictures of `data_dir` as Splits.

    val_split: share of train held out, per class, where the set has no validation part of its own.
    subset: keep a share (at most 1) or a number (above 1) of the training pictures of all classes.
    classes: the labels of an existing run (names or folder names): labels are numbered as there.
    check_files: refuse a table that names files which do not exist (False with --bad-data skip).
    several: any number of labels for each picture, which only tables can say. Raises UserError
    naming folder, file or column.
    """
    if fmt not in FORMATS:
        raise UserError(f"--data-format {fmt!r} is unknown for classify; choose from {', '.join(FORMATS)}")
    if not 0 <= val_split < 1:
        raise UserError(f"--val-split {val_split} must be at least 0 and below 1")
    if not subset > 0:
        raise UserError(f"--subset {subset} must be above 0: a share up to 1, or a number of pictures")
    if several:
        splits = read_tables(_table(data_dir, fmt), check_files, several)
    elif fmt == "shapes":
        splits = classification_splits()
    else:
        splits = _read(existing_path(data_dir), fmt, check_files)
    if classes is not None:
        splits = _renumber(splits, list(classes), data_dir)
    elif len(splits.classes) < 2 and not several:
        raise UserError(f"{data_dir}: only one class ({splits.classes[0]!r}); a classifier needs at least two")
    if splits.train is None and require_train:
        raise UserError(
            f"{data_dir}: no training pictures (no train/ and no class folders); expected train/<class>/*.jpg"
        )
    if splits.train is not None:
        splits.train, splits.val = _carve(splits, val_split, subset, seed, data_dir)
    return splits


def unlabelled(path: str | os.PathLike) -> Split:
    """Every picture below a folder (or the one file) by name, with label -1: for predictions."""
    path = existing_path(path)
    if path.is_file() and path.suffix.lower() in TABLES:
        return read_unlabelled(path)
    if path.is_file():
        return Split([Sample(path.name)], path.parent)
    names = list_pictures(path, left=(left := LeftOut()))
    if not names:
        raise UserError(f"{path}: no pictures in this folder" + "".join(f" ({note})" for note in left.notes()))
    return Split(map(Sample, names), path, left.notes())


def _table(data_dir: str | os.PathLike | None, fmt: str) -> Path:
    """A table, or a folder with tables; UserError for what gives each picture one label."""
    path = Path() if fmt == "shapes" else existing_path(data_dir)
    if fmt not in ("auto", "csv") or is_shards(path) or not (path.is_file() or list_tables(path)):
        raise UserError(
            f"--multi-label: {data_dir or 'generated shapes'}: class folders, shards and shapes have one label for "
            "each picture; name a table with a column labels (cat;dog), or with a column of 0 and 1 for each class"
        )
    return path


def _read(path: Path, fmt: str, check_files: bool) -> Splits:
    if fmt == "shards" and not is_shards(path):
        raise UserError(f"--data-dir {path}: no shards here; write them with python -m minilora.commands.shards")
    if fmt == "shards" or (fmt == "auto" and is_shards(path)):
        return read_picture_shards(path)
    if fmt == "auto" and path.is_dir():
        try:
            return _folders_or_tables(path, check_files)
        except UserError as error:
            if other := "vqa" if has_questions(path) else "choice" if (path / VISUAL7W).is_file() else None:
                raise UserError(f"{error}; questions lie here, which --task {other} reads") from None
            raise
    if fmt in ("auto", "csv"):
        return read_tables(path, check_files)
    if not path.is_dir():
        raise UserError(f"--data-dir {path}: is a file; class folders need a folder (a table: --data-format csv)")
    return read_folders(path)


def parts_of(path: Path) -> dict[str, Path]:
    """{part: its folder of class folders, or its table} of a data folder; {} if it has no parts."""
    named = find_parts((table.name for table in list_tables(path)), path)
    return (path.is_dir() and parts_below(path)) or {part: path / name for part, name in named.items()}


def loose_part(path: Path, part: str) -> Path | None:
    """The folder of a data folder that is named like `part`, whatever it holds."""
    folders = [entry.name for entry in entries(path, path, lenient=True) if is_folder(entry)]
    name = find_parts(folders, path).get(part)
    return path / name if name else None


def _folders_or_tables(path: Path, check_files: bool) -> Splits:
    """Where a folder holds both: its parts with class folders, else a table of labelled pictures,
    else class folders. The notes say what was not read."""
    tables, other = list_tables(path), "--data-format csv reads tables"
    folders = not tables or bool(parts_below(path)) or (has_class_folders(path) and not any(map(is_labelled, tables)))
    if not folders and has_class_folders(path):
        other = "--data-format folder reads class folders"
        try:
            splits = read_tables(path, check_files)
        except UserError as error:
            raise UserError(f"{error}; {other}") from None
        splits.notes.append(f"the folders beside the table are no classes; {other}")
        return splits
    splits = read_folders(path) if folders else read_tables(path, check_files)
    if folders and tables:
        splits.notes.append(f"not read: {', '.join(table.name for table in tables)}; {other}")
    return splits


def _renumber(splits: Splits, classes: list[str], data_dir) -> Splits:
    """The same pictures with labels numbered as in `classes` (of an earlier run)."""
    number = {spelled(name): i for i, name in enumerate(classes)} | {name: i for i, name in enumerate(classes)}
    names = zip(splits.classes, splits.keys, strict=True)
    new = [next((number[one] for one in (name, key, spelled(name)) if one in number), None) for name, key in names]
    if None in new:
        unknown = splits.keys[new.index(None)]
        raise UserError(f"{data_dir}: class {unknown!r} is not a class of this run ({', '.join(classes[:8])} ...)")
    for split in filter(None, (splits.train, splits.val, splits.test)):
        split.samples = [Sample(path, recoded(label, new, len(classes))) for path, label in split.samples]
    return replace(splits, classes=classes, keys=list(classes))


def spelled(name: str) -> str:
    """A class name as words in small letters, so that Border_terrier is "border terrier"."""
    return " ".join(nfc(name).replace("_", " ").split()).casefold()


def _carve(splits: Splits, val_split: float, subset: float, seed: int, data_dir) -> tuple[Split, Split]:
    """Hold out a validation part where there is none, then keep the asked-for subset of train."""
    train, val = splits.train, splits.val
    if val is None:
        if not val_split:
            raise UserError(f"{data_dir}: no val/ part; give --val-split, for example --val-split 0.1")
        held, kept = stratified(train, lambda n: min(max(1, round(n * val_split)), n - 1), seed)
        if not held:
            raise UserError(
                f"{data_dir}: every class has one picture, none can be held out for validation; "
                "add pictures or a val/ folder"
            )
        train, val = train.take(kept), train.take(held)
    share = subset if subset <= 1 else min(subset / len(train), 1.0)
    if share < 1:
        kept, _ = stratified(train, lambda n: max(1, round(n * share)), seed)
        train = train.take(kept)
    return train, val


def few_shots(splits: Splits, shots: int, seed: int) -> Split:
    """`shots` training pictures of each class by `seed`; UserError names classes with fewer."""
    have = Counter(sample.label for sample in splits.train)
    short = [f"{name} {have[i]}" for i, name in enumerate(splits.classes) if have[i] < shots]
    if short:
        some = ", ".join(short[:5]) + f" and {len(short) - 5} more" * (len(short) > 5)
        raise UserError(f"--shots {shots}: these classes have fewer training pictures: {some}")
    return splits.train.take(stratified(splits.train, lambda n: shots, seed)[0])


def stratified(split: Split, share: Callable[[int], int], seed: int) -> tuple[list[int], list[int]]:
    """Draw share(n) of the n samples of every class (of several labels: the rarest); returns
    (drawn, rest), each in the split's order."""
    labels = strata([sample.label for sample in split])
    rng, drawn = np.random.default_rng(seed), np.zeros(len(split), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        drawn[rng.permutation(members)[: max(share(len(members)), 0)]] = True
    return np.flatnonzero(drawn).tolist(), np.flatnonzero(~drawn).tolist()
