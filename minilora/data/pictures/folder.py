"""Pictures in class folders, ImageWoof's layout: `train/<class>/*.jpg`, `val/<class>/*.jpg`,
optionally `test/`.

Here is also what every picture set gives: a `Split` is a sequence of `Sample(path, label)` that
loads its own pictures, and `Splits` holds train, val and test with the names of the classes.
Listing opens no picture, so that a folder of 100,000 files is there in a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from minilora import ticker
from minilora.data.json_file import read_json
from minilora.data.pictures.images import inside, is_picture, open_image
from minilora.errors import UserError

PARTS = ("train", "val", "test")


class Sample(NamedTuple):
    """One labelled picture, not opened yet."""

    path: str  # relative to the split's root, with forward slashes
    label: int  # class index, -1 = unknown


class Split(Sequence):
    """Samples and the folder they live in. `load(i)` opens picture i (BadImage if
    that is impossible)."""

    def __init__(self, samples: Iterable[Sample], root: str | os.PathLike):
        self.samples, self.root = list(samples), str(root)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Sample:
        return self.samples[i]

    def load(self, i: int) -> Image.Image:
        """Picture i as 8-bit RGB; BadImage says why that is impossible."""
        return open_image(os.path.join(self.root, self.samples[i].path), self.root)

    def take(self, indices: Iterable[int]) -> Split:
        """The samples at `indices`, in that order."""
        return Split((self.samples[i] for i in indices), self.root)


@dataclass
class Splits:
    """train / val / test (None where there is none), class names by index, and what the set
    says of each class."""

    train: Split | None
    val: Split | None
    test: Split | None
    classes: list[str]
    # folder names or csv labels, before classes.json named them
    keys: list[str] = field(default_factory=list)
    info: dict[str, dict] = field(default_factory=dict)  # key -> its entry in classes.json

    def __post_init__(self):
        self.keys = self.keys or list(self.classes)


def existing_path(data_dir: str | os.PathLike | None) -> Path:
    """The folder (or file) given by --data-dir, or a UserError."""
    if data_dir is None:
        raise UserError("--data-dir is missing: name the folder (or csv file) with the pictures")
    path = Path(data_dir)
    if not path.exists():
        raise UserError(f"--data-dir {path}: no such folder or file; if it was moved, name its new place")
    return path


def refuse_missing(paths: Iterable[str], root: str | os.PathLike, advice: str) -> None:
    """One UserError for all files that a set names and `root` lacks, before an epoch stumbles over
    the first; `advice` ends it."""
    used = sorted(set(paths))
    missing = [path for path in used if not os.path.lexists(os.path.join(root, path))]
    if missing:
        some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise UserError(f"{len(missing)} of {len(used)} pictures are not below {root}: {some}; {advice}")


def list_pictures(folder: str | os.PathLike, root: str | os.PathLike | None = None) -> list[str]:
    """Paths of the pictures below `folder`, relative to it, sorted. Links that leave `root`
    raise UserError."""
    folder, root = os.fspath(folder), os.fspath(root or folder)
    return sorted(ticker.through(_pictures_below(folder, root), f"listing {folder}, pictures"))


def _pictures_below(folder: str, root: str) -> Iterator[str]:
    # a folder and the real paths above it, to notice loops
    queue = [("", (os.path.realpath(folder),))]
    while queue:
        prefix, above = queue.pop()
        try:
            entries = list(os.scandir(os.path.join(folder, prefix)))
        except OSError as error:
            raise UserError(f"{os.path.join(folder, prefix)}: cannot be listed ({error.strerror})") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not inside(entry.path, root):
                raise UserError(f"{entry.path}: link to outside the data folder {root}; copy the files into it")
            if entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
                if real not in above:
                    queue.append((f"{prefix}{entry.name}/", (*above, real)))
            elif is_picture(entry.name):
                yield prefix + entry.name


def class_names(root: Path, keys: list[str]) -> tuple[list[str], list[str], dict[str, dict]]:
    """(keys in class order, display names, info) from classes.json beside the folders, else
    the sorted keys.

    classes.json is {key: {"name": ...}}, {key: name}, or a list: of the keys (it then fixes the
    order of the classes) or of one name per sorted key.
    """
    path = root / "classes.json"
    if not path.is_file():
        return keys, list(keys), {}
    content = read_json(path)
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        if sorted(content) == sorted(keys):
            return list(content), list(content), {}
        if len(content) == len(keys) and len(set(content)) == len(keys):
            return keys, list(content), {}
        raise UserError(
            f"{path}: lists {len(content)} classes, the folder has {len(keys)}; "
            "name each once, in the order of the folders"
        )
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a list of names or an object of class folder: name")
    info = {key: value if isinstance(value, dict) else {"name": value} for key, value in content.items()}
    names = [str(info.get(key, {}).get("name", key)) for key in keys]
    twice = {name for name in names if names.count(name) > 1}
    names = [f"{name} ({key})" if name in twice else name for name, key in zip(names, keys, strict=True)]
    return keys, names, {key: info[key] for key in keys if key in info}


def read_folders(root: Path) -> Splits:
    """Class folders below train/, val/ and test/; without these, class folders right below
    `root` are train."""
    parts = {name: root / name for name in PARTS if (root / name).is_dir()}
    listed = {name: _class_folders(folder, root) for name, folder in (parts or {"train": root}).items()}
    if "test" in listed and not listed["test"]:
        del listed["test"]  # loose pictures without labels: for predictions, not for scoring
    base = listed.get("train") or listed.get("val") or listed.get("test")
    if not base:
        raise UserError(f"{root}: no class folders; expected train/<class>/*.jpg or <class>/*.jpg")
    keys, names, info = class_names(root, sorted(base))
    index = {key: i for i, key in enumerate(keys)}
    splits = {}
    for part, folders in listed.items():
        unknown = sorted(set(folders) - set(index))
        if unknown:
            raise UserError(
                f"{root / part}: class folder {unknown[0]!r} is not among the training classes; "
                "add it to train/ or take it away"
            )
        prefix = f"{part}/" if parts else ""
        splits[part] = Split(
            (Sample(f"{prefix}{key}/{name}", index[key]) for key in keys for name in folders.get(key, ())), root
        )
    return Splits(*map(splits.get, PARTS), names, keys, info)


def has_class_folders(root: Path) -> bool:
    """Whether train/, val/ or test/ of `root` holds folders (pictures that a table names may
    lie there loosely)."""
    parts = (root / part for part in PARTS)
    return any(entry.is_dir() for part in parts if part.is_dir() for entry in os.scandir(part))


def _class_folders(folder: Path, root: Path) -> dict[str, list[str]]:
    """class folder -> its pictures; an empty class is an error."""
    found = {}
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in ticker.through(entries, f"listing {folder}, classes"):
        if entry.is_symlink() and not inside(entry.path, root):
            raise UserError(f"{entry.path}: link to outside the data folder {root}; copy the files into it")
        if entry.is_dir() and not entry.name.startswith((".", "__")):
            found[entry.name] = list_pictures(entry.path, root)
            if not found[entry.name]:
                raise UserError(f"{entry.path}: class folder without a picture; add pictures or remove it")
    return found
