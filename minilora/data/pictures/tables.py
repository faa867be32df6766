"""Picture classification from csv files.

A folder with train.csv, val.csv, test.csv, or with one csv whose rows are divided by an `is_valid`
(True / False) or `split` (train / val / test) column, or all train. Columns are found by their
header; paths are relative to the csv. Other readers (multiple choice) use `read_rows` and
`contained` from here.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path, PurePosixPath, PureWindowsPath

from minilora.data.pictures.folder import PARTS, Sample, Split, Splits, class_names, refuse_missing
from minilora.errors import UserError

FILE_COLUMNS = ("file", "filename", "path", "file_path", "filepath", "image_path", "img_path", "image", "img")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "noisy_labels_0")
VALID_COLUMN, SPLIT_COLUMN = "is_valid", "split"
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def find_tables(folder: Path) -> dict[str, Path]:
    """{"train": .., "val": .., "test": ..} of a folder; a single csv of any other name is "all"."""
    if not folder.is_dir():
        return {"all": folder}
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".tsv") and path.is_file())
    named = {SPLIT_NAMES[path.stem.lower()]: path for path in tables if path.stem.lower() in SPLIT_NAMES}
    if named or not tables:
        return named
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UserError(f"{folder}: several csv files ({names}); name one as --data-dir, or call them train.csv ...")
    return {"all": tables[0]}


def read_tables(path: Path, check_files: bool = True) -> Splits:
    """Splits from the csv at `path`, or from those in the folder `path`. Raises UserError
    with file and line.

    check_files: also when a picture that a row names is not there.
    """
    tables = find_tables(path)
    if not tables:
        raise UserError(f"{path}: no csv file in this folder")
    root = path if path.is_dir() else path.parent
    parts: dict[str, dict[str, str]] = {}  # split -> file -> label
    for part, table in tables.items():
        for name, file, label, line in _labelled_rows(table, part, required=part != "test"):
            _place(parts, name, file, label, f"{table}, line {line}")
    if not any(parts.values()):
        raise UserError(f"{path}: no rows below the header")
    trained = parts.get("train") or parts.get("val") or parts.get("test")
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
    return Splits(*map(splits.get, PARTS), names, keys, info)


def read_unlabelled(path: Path) -> Split:
    """The pictures of one csv in the order of its rows, label -1; a label column is not needed."""
    header, rows = read_rows(path)
    column = _find(header, FILE_COLUMNS, path, "picture")
    return Split((Sample(contained(row[column], f"{path}, line {n}"), -1) for n, row in rows), path.parent)


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """(column names, [(line number, row)]) of a csv or tsv in UTF-8, with or without a
    byte order mark.

    Raises UserError for broken UTF-8, a missing header, a column named twice, or a row
    of another length.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save the table as UTF-8") from None
    first = text.lstrip().partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                continue
            if len(cells) != len(header):
                raise UserError(f"{path}, line {reader.line_num}: {len(cells)} fields, the header has {len(header)}")
            rows.append((reader.line_num, dict(zip(header, (cell.strip() for cell in cells), strict=True))))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not a readable table ({error})") from None
    if header is None:
        raise UserError(f"{path}: the table is empty; the first line must name the columns")
    if len(set(header)) < len(header):
        raise UserError(f"{path}: a column name stands twice in {', '.join(header)}")
    return header, rows


def contained(file: str, where: str) -> str:
    """`file` as a clean relative path with forward slashes; what is absolute or climbs with
    `..` is refused."""
    slashed = file.replace("\\", "/")
    parts = PurePosixPath(slashed).parts
    if not parts or "\0" in file:
        raise UserError(f"{where}: the picture's path {file!r} is empty or broken; correct the row")
    if slashed.startswith("/") or PureWindowsPath(file).drive or ".." in parts:
        raise UserError(f"{where}: the picture {file!r} lies outside the data folder; use a path below it")
    return "/".join(parts)


def _labelled_rows(table: Path, part: str, required: bool):
    """Yields (split, file, label, line) of one csv; nothing for a test table without labels."""
    header, rows = read_rows(table)
    file_column = _find(header, FILE_COLUMNS, table, "picture")
    label_column = _find(header, LABEL_COLUMNS, table, "label", required)
    if label_column is None:
        return
    lower = {name.lower(): name for name in header}
    for line, row in rows:
        where = f"{table}, line {line}"
        if not row[label_column]:
            raise UserError(f"{where}: the label is empty; every row of training data needs one")
        name = "train" if part == "all" else part
        if part == "all" and VALID_COLUMN in lower:
            valid = row[lower[VALID_COLUMN]].lower()
            if valid not in TRUTH:
                raise UserError(f"{where}: {VALID_COLUMN} is {valid!r}; expected True or False")
            name = "val" if TRUTH[valid] else "train"
        elif part == "all" and SPLIT_COLUMN in lower:
            value = row[lower[SPLIT_COLUMN]].lower()
            if value not in SPLIT_NAMES:
                raise UserError(f"{where}: split is {value!r}; expected one of {', '.join(SPLIT_NAMES)}")
            name = SPLIT_NAMES[value]
        yield name, contained(row[file_column], where), row[label_column], line


def _place(parts: dict[str, dict[str, str]], name: str, file: str, label: str, where: str) -> None:
    for part, rows in parts.items():
        if file in rows:
            raise UserError(f"{where}: {file} stands twice (in {part} with label {rows[file]!r}); keep one row")
    parts.setdefault(name, {})[file] = label


def _find(header: list[str], names: tuple[str, ...], path: Path, what: str, required: bool = True) -> str | None:
    lower = {name.lower(): name for name in header}
    column = next((lower[name] for name in names if name in lower), None)
    if column is None and required:
        raise UserError(f"{path}: no {what} column; the header has {', '.join(header)}, known are {', '.join(names)}")
    return column


def _numbers_first(label: str):
    """Labels 0, 1, ... 10 in the order of the numbers, names in the order of the alphabet."""
    return (0, int(label), label) if label.isdecimal() and len(label) < 18 else (1, 0, label)
