"""Picture classification from csv files, or from a json file: a list of objects, one for each row.

A folder with tables named like its parts (train.csv, valid.csv, seg_test.csv: parts.py), or with
one csv; an `is_valid` (True / False) or `split` (train / val / test) column divides the rows.
Columns are found by their header, see COLUMNS. A picture is a path relative to the csv, or the name
or id of a file below its folder. Multiple choice uses `read_rows` and `contained` from here.
"""

import csv
import io
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from minilora.data.pictures.folder import Sample, Split, Splits, class_names, refuse_missing
from minilora.data.pictures.label_sets import BITS, END, MARKS, binary_columns, coded, json_rows, split_cells
from minilora.data.pictures.parts import NAMES, PARTS, find_parts, list_pictures, nfc, part_named
from minilora.errors import UserError
from minilora.textfiles import DATA, from_cell, read_bytes

# what a column may be called, the first found counts; in a header "Image ID" is image_id
COLUMNS = {
    "picture": ("file", "filename", "file_name", "path", "file_path", "filepath", "filepaths", "image_path")
    + ("img_path", "image", "img", "image_file", "image_name", "img_name", "picture", "photo", "image_id", "id"),
    "label": ("label", "labels", "class", "class_name", "target", "category", "breed", "species", "diagnosis")
    + ("noisy_labels_0",),
    "labels": ("labels", "label", "tags", "tag", "finding_labels", "classes", "categories", "genres", "genre")
    + ("attribute_ids", "targets", "target", "class", "class_name"),
    "split": ("split", "set", "data_set", "dataset", "subset", "partition"),
    "validation": ("is_valid", "is_validation"),
}
MORE = {"label": "; several labels for a picture, tags or columns of 0 and 1, are for --multi-label"}
MORE |= {"labels": "; or there may be a column of 0 and 1 for each class"}
BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
TABLES = (".csv", ".tsv", ".json")  # what --data-dir may name; in a folder a json is no table


def list_tables(folder: Path) -> list[Path]:
    """The csv and tsv files of a folder, by name."""
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in names if p.suffix.lower() in (".csv", ".tsv") and p.is_file() and not p.name.startswith(".")]


def find_tables(folder: Path, several: bool = False) -> dict[str, Path]:
    """{"train": .., "val": .., "test": ..} of a folder; a single csv of any other name, or the only
    one with pictures and labels, is "all"."""
    if not folder.is_dir():
        return {"all": folder}
    tables = list_tables(folder)
    if named := find_parts((path.name for path in tables), folder):
        return {part: folder / name for part, name in named.items()}
    if len(tables) > 1 and len(labelled := [table for table in tables if is_labelled(table, several)]) == 1:
        tables = labelled
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UserError(f"{folder}: several csv files ({names}); name one as --data-dir, or call them train.csv ...")
    return {"all": tables[0]} if tables else {}


def is_labelled(table: Path, several: bool = False) -> bool:
    """Whether a file is a table with a column of pictures and one (or columns) of labels."""
    try:
        header, rows = read_rows(table)
    except UserError:
        return False
    picture = find_column(header, "picture", table, required=False)
    return bool(picture and _label_columns(table, header, rows, {picture}, several))


def read_tables(path: Path, check_files: bool = True, several: bool = False) -> Splits:
    """Splits from the csv at `path`, or from those in the folder; UserError names file and line.

    check_files: also when a picture that a row names is not there. several: any number of labels
    for each picture, see label_sets.py.
    """
    tables = find_tables(path, several)
    if not tables:
        raise UserError(f"{path}: no csv file in this folder")
    root, notes = path if path.is_dir() else path.parent, []
    classes = set() if several else None  # those that have a column of their own
    rows = [row for part, table in tables.items() for row in _labelled_rows(table, part, root, notes, classes)]
    places = located((file for _, file, _, _ in rows), root)
    parts: dict[str, dict[str, str]] = {}  # split -> file -> label
    for name, file, label, where in rows:
        _place(parts, name, places[file], label, where)
    if not any(parts.values()):
        raise UserError(f"{path}: no rows below the header")
    trained = parts.get("train") or parts.get("val") or parts.get("test")
    cells = [cell for rows in parts.values() for cell in rows.values()]
    if several:
        mark, words = split_cells(set(cells), path)
        each = sum(len(words[cell]) for cell in cells) / len(cells)
        none = sum(not words[cell] for cell in cells)
        notes.insert(0, f"labels from {MARKS[mark]}, {each:.2f} for each picture, {none} with none")
    else:
        notes += refuse_several(set(trained.values()), path)
        words = {cell: [cell] for cell in cells}
    labels = {label for cell in trained.values() for label in words[cell]} | (classes or set())
    if not labels:
        raise UserError(f"{path}: no picture has a label")
    keys, names, info = class_names(root, sorted(labels, key=_numbers_first))
    index, splits = {key: i for i, key in enumerate(keys)}, {}
    for part, rows in parts.items():
        for file, cell in rows.items():
            if strange := [label for label in words[cell] if label not in index]:
                raise UserError(
                    f"{path}: unknown label {strange[0]!r} of {file} in {part}: not among the training labels"
                )
        found = {cell: [index[label] for label in words[cell]] for cell in set(rows.values())}
        codes = {cell: coded(there, len(keys)) if several else there[0] for cell, there in found.items()}
        splits[part] = Split((Sample(file, codes[cell]) for file, cell in rows.items()), root)
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
    return Split((Sample(places[file]) for file in files), path.parent)


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """(column names, [(line number, row)]) of a csv or tsv in UTF-8, or in UTF-16 with its mark; or
    of a json list of objects.

    A first line `sep=;` names the separator. Empty columns at the end are left out. Raises
    UserError for broken text, a missing header, a column named twice, or a row of another length.
    """
    if Path(path).suffix.lower() == ".json":
        return json_rows(Path(path))
    try:
        content = read_bytes(path, DATA)
        text = content.decode(BYTE_ORDER_MARKS.get(content[:2], "utf-8-sig"))
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
            cells = [from_cell(cell.strip()) for cell in cells]
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
            known.setdefault(nfc(name).replace("\\", "/"), []).append(path)
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
    for mark in f"{END}|;,+&/ ":
        words = {label: frozenset(w.strip("'\" ") for w in cell.split(mark)) - {""} for label, cell in bare.items()}
        several = sorted((label for label in labels if len(words[label]) > 1), key=lambda label: -len(words[label]))
        sets = {words[label] for label in several}
        nested = len(frozenset().union(*words.values())) < len(labels) and any(
            a < b for a in words.values() for b in sets
        )
        whole = [label for label in several if mark in f"{END}|;" or words[label] <= alone or label.startswith("[")]
        if whole or nested or len(sets) < len(several):
            cell = (whole or several)[0].strip(END).replace(END, ", ")
            raise UserError(
                f"{path}: {cell!r} is several labels in one cell; one label per row is needed, or --multi-label. If "
                "it is one class, write it as one word, as in sea_lion"
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
        more = MORE.get(kind, "")
        raise UserError(f"{path}: no {kind} column; the header has {has}; it may be called {', '.join(known)}{more}")
    return column


def _label_columns(
    table: Path, header: list[str], rows: list, other: Collection[str | None], several: bool, required: bool = False
) -> list[str]:
    """The column of labels; [] where there is none. With `several` it may be columns of 0 and 1,
    but for those of `other` use."""
    kind = "labels" if several else "label"
    label = find_column(header, kind, table, required and not several)
    if label or not several:
        return [label] * bool(label)
    found = binary_columns(rows, [name for name in header if name and name not in other], table)
    if required and len(found) < 2:
        find_column(header, kind, table)
    return found if len(found) > 1 else []


def _labelled_rows(table: Path, part: str, root: Path, notes: list[str], classes: set[str] | None):
    """Yields (split, file, label, where) of one csv; nothing for a test table without labels. Where
    a picture may have several, `classes` gets those with a column of their own."""
    header, rows = read_rows(table)
    picture = find_column(header, "picture", table)
    valid, split = (find_column(header, kind, table, required=False) for kind in ("validation", "split"))
    found = _label_columns(table, header, rows, (picture, valid, split), classes is not None, part != "test")
    if not found:
        notes.append(f"{table.name}: no label column, its {len(rows)} rows are for predictions only")
        return
    label = found[0]
    if len(found) > 1:
        classes.update(map(nfc, found))
    if split and split.lower() != "split" and not {row[split].lower() for _, row in rows} <= NAMES.keys():
        split = None  # such a name may mean something else
    if other := [name for name in header if name and name not in (picture, *found, valid, split)]:
        shown = ", ".join(other[:8]) + (" ..." if len(other) > 8 else "")
        source = f"{label!r}" + f" and {len(found) - 1} others" * (len(found) > 1)
        notes.append(f"{table.name}: pictures from {picture!r}, labels from {source}; not read: {shown}")
    for line, row in rows:
        where = f"{table}, line {line}"
        cell = row[label] if classes is not None else row[label].removesuffix(END)
        if len(found) > 1:
            cell = "".join(f"{name}{END}" for name in found if BITS[row[name].lower()])
        elif not cell and classes is None:
            raise UserError(f"{where}: the label is empty; every row of training data needs one")
        name = "train" if part == "all" else part
        if valid:
            if row[valid].lower() not in BITS:
                raise UserError(f"{where}: {valid} is {row[valid]!r}; expected True or False")
            name = "val" if BITS[row[valid].lower()] else name
        elif split:
            name = part_named(row[split], where)
        yield name, contained(row[picture], where, root), nfc(cell), where


def _place(parts: dict[str, dict[str, str]], name: str, file: str, label: str, where: str) -> None:
    for part, rows in parts.items():
        if file in rows:
            raise UserError(
                f"{where}: {file} stands twice (in {part} with label {rows[file]!r}); keep one row for each picture"
            )
    parts.setdefault(name, {})[file] = label


def _numbers_first(label: str):
    """Labels 0, 1, ... 10 in the order of the numbers, names in the order of the alphabet."""
    return (0, int(label), label) if label.isdecimal() and len(label) < 18 else (1, 0, label)
