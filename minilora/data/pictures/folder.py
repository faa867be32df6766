"""Pictures in class folders, ImageWoof's layout: `train/<class>/*.jpg`, `val/<class>/*.jpg`,
optionally `test/`.

A folder named like a part (parts.py) that holds no folders is no part: beside class folders it is
one of the classes.

Here is also what every picture set gives: a `Split` is a sequence of `Sample(path, label)` that
loads its own pictures, and `Splits` holds train, val and test with the names of the classes.
Listing opens no picture, so that a folder of 100,000 files is there in a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from minilora import ticker
from minilora.data.pictures.images import is_picture, open_image
from minilora.data.pictures.parts import PARTS, LeftOut, entries, find_parts, is_folder, list_pictures, nfc, part_of
from minilora.errors import UserError
from minilora.textfiles import read_json


class Sample(NamedTuple):
    """One labelled picture, not opened yet."""

    path: str  # relative to the split's root, with forward slashes
    label: int | bytes = -1  # class index, -1 = unknown; of several labels see label_sets.py


class Split(Sequence):
    """Samples and the folder they live in. `load(i)` opens picture i (BadImage if that is
    impossible). `notes`: what was left out there."""

    def __init__(self, samples: Iterable[Sample], root: str | os.PathLike, notes: Iterable[str] = ()):
        self.samples, self.root, self.notes = list(samples), str(root), list(notes)

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
    """train / val / test (None where there is none) and the class names by index."""

    train: Split | None
    val: Split | None
    test: Split | None
    classes: list[str]
    keys: list[str] = field(default_factory=list)  # folder names or csv labels
    info: dict[str, dict] = field(default_factory=dict)  # key -> its entry in classes.json
    notes: list[str] = field(default_factory=list)  # what was left out, and what was taken for what
    unlabelled: Split | None = None  # more training pictures, of which only a teacher speaks

    def __post_init__(self):
        self.keys = self.keys or list(self.classes)


def refuse_missing(paths: Iterable[str], root: str | os.PathLike, advice: str) -> None:
    """One UserError for all files that a set names and `root` lacks; `advice` ends it."""
    used = sorted(set(paths))
    missing = [path for path in used if not os.path.lexists(os.path.join(root, path))]
    if missing:
        some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise UserError(f"{len(missing)} of {len(used)} pictures are not below {root}: {some}; {advice}")


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
        content = list(map(nfc, content))
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
    info = {nfc(key): value if isinstance(value, dict) else {"name": value} for key, value in content.items()}
    names = [nfc(str(info.get(key, {}).get("name", key))) for key in keys]
    twice = {name for name in names if names.count(name) > 1}
    names = [f"{name} ({key})" if name in twice else name for name, key in zip(names, keys, strict=True)]
    return keys, names, {key: info[key] for key in keys if key in info}


def read_folders(root: Path) -> Splits:
    """Class folders below the parts of `root`; without parts, those right below it are train.

    What is taken otherwise than a plain layout says, and what is left out, stands in the notes.
    """
    left, notes, parts = LeftOut(), [], parts_below(root)
    found = {part: _class_folders(folder, root, left) for part, folder in (parts or {"train": root}).items()}
    base = found.get("train") or found.get("val") or found.get("test")
    named = find_parts(base or (), root).values()
    if not base or len(named) == len(base):
        raise UserError(f"{root}: no class folders; expected train/<class>/*.jpg or <class>/*.jpg")
    if not parts and len(base) == 1 and parts_below(root / (only := next(iter(base)))):
        raise UserError(f"{root}: the parts lie one folder deeper; give --data-dir {root / only}")
    if parts:
        _beside(root, parts, left)
    elif named:
        notes.append(f"{', '.join(named)}: no class folders in it, taken as a class beside the others")
    if renamed := [f"{part} from {folder.relative_to(root)}/" for part, folder in parts.items() if folder.name != part]:
        notes.append(f"parts: {', '.join(renamed)}")
    level = 2 + len(parts and next(iter(parts.values())).relative_to(root).parts)
    if deep := [path for folders in found.values() for paths in folders.values() for path in paths
                if path.count("/") >= level]:  # fmt: skip
        notes.append(f"{len(deep)} pictures lie in folders below a class folder and count for it ({deep[0]})")
    keys, names, info = class_names(root, sorted(base))
    index = {key: i for i, key in enumerate(keys)}
    splits = {}
    for part, folders in found.items():
        if unknown := sorted(set(folders) - set(index)):
            raise UserError(
                f"{parts.get(part, root)}: class folder {unknown[0]!r} is not among the training classes; "
                "add it to the training part or take it away"
            )
        splits[part] = Split((Sample(path, index[key]) for key in keys for path in folders.get(key, ())), root)
    return Splits(*map(splits.get, PARTS), names, keys, info, notes + left.notes())


def parts_below(root: Path) -> dict[str, Path]:
    """{part: its folder} of the folders in `root` that are named like parts and hold folders. In
    seg_train/seg_train/<class>, where nothing else lies in the outer one, the inner one counts."""

    def folders(path: Path) -> list[Path]:
        return [Path(entry.path) for entry in entries(path, root, lenient=True) if is_folder(entry)]

    holding = {}
    for path in (path for path in folders(root) if part_of(path.name)):
        inner = folders(path)
        if [one.name for one in inner] == [path.name] and (deeper := folders(inner[0])):
            path, inner = inner[0], deeper
        if inner:
            holding[path.name] = path
    return {part: holding[name] for part, name in find_parts(holding, root).items()}


def has_class_folders(root: Path) -> bool:
    """Whether `root` holds two or more folders of pictures that are not named like parts."""
    folders = (entry for entry in entries(root, root, lenient=True) if is_folder(entry) and not part_of(entry.name))
    return sum(any(is_picture(one.name) for one in os.scandir(folder)) for folder in folders) > 1


def _beside(root: Path, parts: dict[str, Path], left: LeftOut) -> None:
    """Counts the pictures that lie in `root`, but in none of its parts."""
    taken = {path for folder in parts.values() for path in (folder, *folder.parents)}
    for entry in entries(root, root, left, lenient=True):
        if is_folder(entry) and Path(entry.path) not in taken:
            count = sum(is_picture(name) for _, _, names in os.walk(entry.path) for name in names)
            left.add("pictures beside the parts" if count else "folders without pictures", f"{entry.name}/", count or 1)
        elif is_picture(entry.name):
            left.add("pictures outside class folders", entry.name)


def _class_folders(folder: Path, root: Path, left: LeftOut) -> dict[str, list[str]]:
    """class folder -> its pictures, relative to `root`; an empty class is an error."""
    found: dict[str, list[str]] = {}
    for entry in ticker.through(entries(folder, root, left), f"listing {folder}, classes"):
        if is_folder(entry):
            pictures = list_pictures(entry.path, root, left)
            if not pictures:
                raise UserError(f"{entry.path}: class folder without a picture; add pictures or remove it")
            below = Path(entry.path).relative_to(root).as_posix()
            found.setdefault(nfc(entry.name), []).extend(f"{below}/{name}" for name in pictures)
        elif is_picture(entry.name):
            left.add("pictures outside class folders", os.path.relpath(entry.path, root))
    return found
