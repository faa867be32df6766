"""What lies in a data folder: the one place that finds its parts, and counts what is left out.

train/ val/ test/        also Training/ Valid/ TESTING/ ...
seg_train/ seg_test/     with one word around them, the same for all parts: training_set, val2014
train.csv test.csv       tables, json files and the words of a `split` column, by the same names
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from minilora import ticker
from minilora.data.pictures.images import inside, is_picture
from minilora.errors import UserError
from minilora.textfiles import encodable

PARTS = ("train", "val", "test")
NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
NAMES |= {"test": "test", "testing": "test"}
# what storage boxes, macOS, Windows and Python put beside people's pictures, all in lower case
SYSTEM = re.compile(r"\..*|__.*|@.*|#(recycle|snapshot)|\$recycle\.bin|recycler|lost\+found|system volume information")
SYSTEM_FILES = ("thumbs.db", "desktop.ini")


def nfc(text: str) -> str:
    """One form for names that look alike: macOS writes an accent as a character of its own. Bytes
    of a file name that are no UTF-8 become text."""
    return unicodedata.normalize("NFC", encodable(text))


def part_of(name: str) -> tuple[str, tuple[str, str]] | None:
    """(part, what stands before and after it) of a name, None where it names no part.

    "Valid" -> ("val", ("", "")), "seg_train" -> ("train", ("seg_", "")), "brain" -> None
    """
    words = re.split(r"([\W\d_]+)", re.sub(r"\.[ct]sv$", "", name.lower()))
    found = [i for i, word in enumerate(words) if word in NAMES]
    if len(found) != 1:
        return None
    return NAMES[words[found[0]]], ("".join(words[: found[0]]), "".join(words[found[0] + 1 :]))


def existing_path(data_dir: str | os.PathLike | None) -> Path:
    """The folder (or file) given by --data-dir, or a UserError."""
    if data_dir is None:
        raise UserError("--data-dir is missing: name the folder (or csv file) with the pictures")
    path = Path(data_dir)
    if not path.exists():
        raise UserError(f"--data-dir {path}: no such folder or file; if it was moved, name its new place")
    return path


def find_parts(names: Iterable[str], where: str | os.PathLike) -> dict[str, str]:
    """{part: its name} of the folders or tables in `where`; {} where none is named like one.

    Words around the part are the same for all parts, and then there are at least two. Raises
    UserError for two names of one part.
    """
    families: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name in names:
        if (found := part_of(name)) is not None:
            families.setdefault(found[1], {}).setdefault(found[0], []).append(name)
    plain = ("", "")
    families = {around: parts for around, parts in families.items() if around == plain or len(parts) > 1}
    if not families:
        return {}
    parts = families[max(families, key=lambda around: (len(families[around]), around == plain))]
    for part, same in parts.items():
        if len(same) > 1:
            raise UserError(f"{where}: {' and '.join(sorted(same))} are both the {part} part; keep one of them")
    return {part: parts[part][0] for part in PARTS if part in parts}


def part_named(word: str, where: str) -> str:
    """The part that a cell or key names; UserError for another word."""
    if word.lower() not in NAMES:
        raise UserError(f"{where}: split is {word!r}; expected one of {', '.join(NAMES)}")
    return NAMES[word.lower()]


class LeftOut:
    """What a data folder holds and is not read: counted by reason, with an example of each."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.example: dict[str, str] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        if count:
            self.counts[reason] += count
            self.example.setdefault(reason, example)

    def notes(self) -> list[str]:
        """["left out: 3 .heic files (cat/1.heic); ..."], or nothing."""
        found = [f"{count} {reason} ({self.example[reason]})" for reason, count in sorted(self.counts.items())]
        return [f"left out: {'; '.join(found)}"] if found else []


def entries(
    folder: str | os.PathLike, root: str | os.PathLike, left: LeftOut | None = None, lenient: bool = False
) -> Iterator[os.DirEntry]:
    """What a folder holds, by name, without what is hidden or the system's. Raises UserError for a
    folder that cannot be listed and for a link that leaves `root`; `lenient`: only if it is named
    like a part, others are left out.
    """
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{os.fspath(folder)}: cannot be listed ({error.strerror})") from None
    left = LeftOut() if left is None else left
    for entry in found:
        lower = entry.name.lower()
        if SYSTEM.fullmatch(lower) or lower in SYSTEM_FILES:
            left.add("hidden or of the system", os.path.relpath(entry.path, root))
        elif entry.is_symlink() and not inside(entry.path, root):
            if not lenient or part_of(entry.name):
                raise UserError(f"{entry.path}: link to outside the data folder {root}; copy the files into it")
            left.add("links to outside", entry.name)
        else:
            yield entry


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_pictures(
    folder: str | os.PathLike, root: str | os.PathLike | None = None, left: LeftOut | None = None
) -> list[str]:
    """Paths of the pictures below `folder`, relative to it, sorted; other files are counted."""
    folder, root = os.fspath(folder), os.fspath(root or folder)
    return sorted(ticker.through(_pictures_below(folder, root, left), f"listing {folder}, pictures"))


def _pictures_below(folder: str, root: str, left: LeftOut | None) -> Iterator[str]:
    # a folder and the real paths above it, to notice loops
    queue = [("", (os.path.realpath(folder),))]
    while queue:
        prefix, above = queue.pop()
        for entry in entries(os.path.join(folder, prefix), root, left):
            if is_folder(entry):
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
                if real not in above:
                    queue.append((f"{prefix}{entry.name}/", (*above, real)))
            elif is_picture(entry.name):
                yield prefix + entry.name
            elif left is not None:
                kind = os.path.splitext(entry.name)[1].lower()
                left.add(f"{kind} files" if kind else "files without extension", os.path.relpath(entry.path, root))
