"""Picture classification from csv files.

A folder with tables named like its parts (train.csv, valid.csv, seg_test.csv: parts.py), or with
one csv; an `is_valid` (True / False) or `split` (train / val / test) column divides the rows.
Columns are found by their header, see COLUMNS. A picture is a path relative to the csv, or the name
or id of a file below its folder. Multiple choice uses `read_rows` and `contained` from here.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from minilora.data.pictures.folder import Sample, Split, Splits, class_names, refuse_missing
from minilora.data.pictures.parts import NAMES, PARTS, find_parts, list_pictures, nfc, part_named
from minilora.errors import UserError

# what a column may be called, the first found counts; in a header "Image ID" is image_id
COLUMNS = {
    "picture": ("file", "filename", "file_name", "path", "file_path", "filepath", "filepaths", "image_path")
    + ("img_path", "image", "img", "image_file", "image_name", "img_name", "picture", "photo", "image_id", "id"),
    "label": ("label", "labels", "class", "class_name", "target", "category", "breed", "species", "diagnosis")
    + ("noisy_labels_0",),
    "split": ("split", "set", "data_set", "dataset", "subset", "partition"),
    "validation": ("is_valid", "is_validation"),
}
BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def list_tables(folder: Path) -> list[Path]:
    """The csv and tsv files of a folder, by name."""
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in names if p.suffix.lower() in (".csv", ".tsv") and p.is_file() and not p.name.startswith(".")]


def find_tables(folder: Path) -> dict[str, Path]:
    """{"train": .., "val": .., "test": ..} of a folder; a single csv of any other name, or the only
    one with pictures and labels, is "all"."""
    if not folder.is_dir():
        return {"all": folder}
    tables = list_tables(folder)
    if named := find_parts((path.name for path in tables), folder):
        return {part: folder / name for part, name in named.items()}
    if len(tables) > 1 and len(labelled := list(filter(is_labelled, tables))) == 1:
        tables = labelled
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UserError(f"{folder}: several csv files ({names}); name one as --data-dir, or call them train.csv ...")
    return {"all": tables[0]} if tables else {}


def is_labelled(table: Path) -> bool:
    """Whether a file is a table with a column of pictures and one of labels."""
    try:
        header, _ = read_rows(table)
    except UserError:
        return False
    return all(find_column(header, kind, table, required=False) for kind in ("picture", "label"))


def read_tables(path: Path, check_files: bool = True) -> Splits:
    """Splits from the csv at `path`, or from those in the folder `path`. Raises UserError
    with file and line.

    check_files: also when a picture that a row names is not there.
    """
    tables = find_tables(path)
    if not tables:
        raise UserError(f"{path}: no csv file in this folder")
    root, notes = path if path.is_dir() else path.parent, []
    rows = [row for part, table in tables.items() for row in _labelled_rows(table, part, root, notes)]
    places = located((file for _, file, _, _ in rows), root)
    parts: dict[str, dict[str, str]] = {}  # split -> file -> label
    for name, file, label, where in rows:
        _place(parts, name, places[file], label, where)
    if not any(parts.values()):
        raise UserError(f"{path}: no rows below the header")
    trained = parts.get("train") or parts.get("val") or parts.get("test")
    notes += refuse_several(set(trained.values()), path)
    keys, names, info = class_names(root, sorted(set(trained.values()), key=_numbers_first))
    index, splits = {key: i for i, key in enumerate(keys)}, {}
    for part, rows in parts.items():
        for file, label in rows.items():
            if label not in index:
                raise UserError(f"{path}: unknown label {label!r} of {file} in {part}: not among the training labels")
        splits[part] = Split((Sample(file, index[label]) for file, label in rows.items()), root)
    if check_files:
        named = (sample.path for split in splits.values() for sample in split)
        refuse_missing(named, root, "paths in a table are relative to its folder")
    if unread := sorted({table.name for table in list_tables(path)} - {table.name for table in tables.values()}):
        notes.append(f"tables not read: {', '.join(unread)}")
    return Splits(*map(splits.get, PARTS), names, keys, info, notes)


def read_unlabelled(path: Path) -> Split:
    """The pictures of one csv in the order of its rows, label -1; a label column is not needed."""
    header, rows = read_rows(path)
    column = find_column(header, "picture", path)
    files = [contained(row[column], f"{path}, line {n}", path.parent) for n, row in rows]
    places = located(files, path.parent)
    return Split((Sample(places[file], -1) for file in files), path.parent)


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """(column names, [(line number, row)]) of a csv or tsv in UTF-8, or in UTF-16 with its mark.

    A first line `sep=;` names the separator. Empty columns at the end are left out. Raises
    UserError for broken text, a missing header, a column named twice, or a row of another length.
    """
    try:
        content = Path(path).read_bytes()
        text = content.decode(BYTE_ORDER_MARKS.get(content[:2], "utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save the table as UTF-8") from None
    first, _, rest = text.lstrip().partition("\n")
    said = re.fullmatch(r'"?sep=([^\w\s"]|\t)"?', first.strip("\r"), re.IGNORECASE)
    delimiter = said[1] if said else max(",;\t", key=first.count)
    skipped = text.count("\n", 0, len(text) - len(rest)) if said else 0
    lines = io.StringIO(rest if said else text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    header: list[str] | None = None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if header is None:
                header = cells[: max(i for i, cell in enumerate(cells, 1) if cell)]
                continue
            if len(cells) < len(header) or any(cells[len(header) :]):
                where = f"{path}, line {skipped + reader.line_num}"
                raise UserError(f"{where}: {len(cells)} fields, the header has {len(header)}")
            rows.append((skipped + reader.line_num, dict(zip(header, cells, strict=False))))
    except csv.Error as error:
        raise UserError(f"{path}, line {skipped + reader.line_num}: not a readable table ({error})") from None
    if header is None:
        raise UserError(f"{path}: the table is empty; the first line must name the columns")
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        raise UserError(f"{path}: a column name stands twice in {', '.join(header)}")
    return header, rows


def contained(file: str, where: str, root: Path | None = None) -> str:
    """`file` as a clean relative path with forward slashes; what climbs with `..`, or is absolute
    and not below `root`, is refused."""
    slashed = file.replace("\\", "/")
    if root is not None and slashed.startswith("/"):
        base = f"{os.path.abspath(root)}/"
        slashed = slashed.removeprefix(base if slashed.startswith(base) else f"{os.path.realpath(root)}/")
    parts = PurePosixPath(slashed).parts
    if not parts or "\0" in file:
        raise UserError(f"{where}: the picture's path {file!r} is empty or broken; correct the row")
    if slashed.startswith("/") or PureWindowsPath(file).drive or ".." in parts:
        raise UserError(f"{where}: the picture {file!r} lies outside the data folder; use a path below it")
    return "/".join(parts)


def located(files: Iterable[str], root: Path) -> dict[str, str]:
    """{as a table names it: where it lies below `root`}; the same name where it exists there, or
    where nothing else fits.

    A name may lack its extension, have its accents written in another form, and, without a folder,
    lie in any folder; UserError where two files then fit.
    """
    places = {file: file for file in files}
    missing = [file for file in places if not os.path.lexists(root / file)]
    known: dict[str, list[str]] = {}
    for path in list_pictures(root) if missing else ():
        bare, base = os.path.splitext(path)[0], os.path.basename(path)
        for name in {path, bare, base, os.path.splitext(base)[0]}:
            known.setdefault(nfc(name), []).append(path)
    for file in missing:
        found = known.get(nfc(file), [file])
        if len(found) > 1:
            raise UserError(
                f"{root}: the picture {file!r} may be {found[0]} or {found[1]}; write its path in the table"
            )
        places[file] = found[0]
    return places


def refuse_several(labels: Collection[str], path: Path) -> list[str]:
    """UserError where cells hold several labels, for each combination would become a class; [] or a
    note where that is not certain.

    Several they are between | and ;, and between commas or spaces if all words of a cell are labels
    by themselves, if cells differ in their order alone, or if one holds another and there are fewer
    words than labels.
    """
    bare = {label: label.strip("[](){}'\" ") for label in labels}
    alone, notes = set(bare.values()), []
    for mark in "|;,+&/ ":
        words = {label: frozenset(w.strip("'\" ") for w in cell.split(mark)) - {""} for label, cell in bare.items()}
        several = sorted((label for label in labels if len(words[label]) > 1), key=lambda label: -len(words[label]))
        sets = {words[label] for label in several}
        nested = len(frozenset().union(*words.values())) < len(labels) and any(
            a < b for a in words.values() for b in sets
        )
        whole = [label for label in several if mark in "|;" or words[label] <= alone or label.startswith("[")]
        if whole or nested or len(sets) < len(several):
            raise UserError(
                f"{path}: {(whole or several)[0]!r} is several labels in one cell; one label per row is needed. If it "
                "is one class, write it as one word, as in sea_lion"
            )
        beside = ((label, min(words[label] & alone)) for label in several if words[label] & alone)
        notes += [f"the label {label!r} is one class, though {word!r} is one too" for label, word in beside]
    return list(dict.fromkeys(notes))[:3]


def find_column(header: Collection[str], kind: str, path: Path, required: bool = True, but: str = "") -> str | None:
    """The column of a kind of COLUMNS by its usual names; None or UserError where there is none."""
    names = {re.sub(r"[\W_]+", "_", name.strip().lower()): name for name in reversed(header)}
    known = [name for name in COLUMNS[kind] if name != but]
    column = next((names[name] for name in known if name in names), None)
    if column is None and required:
        has = ", ".join(list(header)[:20]) + (" ..." if len(header) > 20 else "")
        raise UserError(f"{path}: no {kind} column; the header has {has}; it may be called {', '.join(known)}")
    return column


def _labelled_rows(table: Path, part: str, root: Path, notes: list[str]):
    """Yields (split, file, label, where) of one csv; nothing for a test table without labels."""
    header, rows = read_rows(table)
    picture = find_column(header, "picture", table)
    label = find_column(header, "label", table, required=part != "test")
    valid, split = (find_column(header, kind, table, required=False) for kind in ("validation", "split"))
    if label is None:
        notes.append(f"{table.name}: no label column, its {len(rows)} rows are for predictions only")
        return
    if split and split.lower() != "split" and not {row[split].lower() for _, row in rows} <= NAMES.keys():
        split = None  # such a name may mean something else
    if other := [name for name in header if name and name not in (picture, label, valid, split)]:
        shown = ", ".join(other[:8]) + (" ..." if len(other) > 8 else "")
        notes.append(f"{table.name}: pictures from {picture!r}, labels from {label!r}; not read: {shown}")
    for line, row in rows:
        where = f"{table}, line {line}"
        if not row[label]:
            raise UserError(f"{where}: the label is empty; every row of training data needs one")
        name = "train" if part == "all" else part
        if valid:
            if row[valid].lower() not in TRUTH:
                raise UserError(f"{where}: {valid} is {row[valid]!r}; expected True or False")
            name = "val" if TRUTH[row[valid].lower()] else name
        elif split:
            name = part_named(row[split], where)
        yield name, contained(row[picture], where, root), nfc(row[label]), where


def _place(parts: dict[str, dict[str, str]], name: str, file: str, label: str, where: str) -> None:
    for part, rows in parts.items():
        if file in rows:
            raise UserError(
                f"{where}: {file} stands twice (in {part} with label {rows[file]!r}); keep one row, with one label"
            )
    parts.setdefault(name, {})[file] = label


def _numbers_first(label: str):
    """Labels 0, 1, ... 10 in the order of the numbers, names in the order of the alphabet."""
    return (0, int(label), label) if label.isdecimal() and len(label) < 18 else (1, 0, label)
