"""Several labels for a picture: cells that hold them, lists in JSON, columns of 0 and 1.

The label of such a Sample is K bytes, 1 where the class is there: small, hashable, in order.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from minilora.errors import UserError
from minilora.textfiles import DATA, read_json

END = "\x1f"  # after each label that comes from a list or from a column of its own
MARKS = {END: "columns or lists", "|": "'|'", ";": "';'", ",": "','", " ": "spaces", "": "whole cells"}
BITS = {"1": True, "1.0": True, "true": True, "yes": True, "0": False, "0.0": False, "false": False, "no": False}
UNSURE = {"", "-1", "-1.0", "nan", "na", "?"}


def split_cells(cells: Collection[str], path: Path) -> tuple[str, dict[str, list[str]]]:
    """(the separator, {cell: its labels}): the first of | ; , and space that stands in some cell.
    UserError where a label has another one of | and ; in it."""
    mark = next(mark for mark in MARKS if not mark or any(mark in cell for cell in cells))
    words = {cell: _words(cell, mark) for cell in cells}
    for label in sorted({label for labels in words.values() for label in labels}):
        if mark != END and (other := {"|", ";"}.intersection(label)):
            raise UserError(f"{path}: labels stand between {MARKS[mark]}, but {label!r} has {min(other)!r}; use one")
    return mark, words


def _words(cell: str, mark: str) -> list[str]:
    """The labels of a cell, also of one such as ['cat', 'dog']."""
    listed = cell[:1] + cell[-1:] in ("[]", "()", "{}")
    words = (cell[1:-1] if listed else cell).split(mark) if mark else [cell]
    return list(dict.fromkeys(filter(None, (word.strip("'\" " if listed else None) for word in words))))


def binary_columns(rows: Sequence[tuple[int, dict[str, str]]], names: Iterable[str], path: Path) -> list[str]:
    """Those of the columns `names` whose cells are 0 or 1. UserError for one that nearly is: nine
    cells of ten, or all but cells such as -1 and empty ones."""
    found = []
    for name in names:
        odd = [(line, row[name]) for line, row in rows if row[name].lower() not in BITS]
        if odd and len(odd) < len(rows) and (10 * len(odd) < len(rows) or {cell.lower() for _, cell in odd} <= UNSURE):
            raise UserError(f"{path}, line {odd[0][0]}: {name} is {odd[0][1]!r}; every row needs 0 or 1 there")
        found += [name] * (not odd)
    return found


def json_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The objects of a json list as rows of texts; what a list holds ends with END."""
    content = read_json(path, DATA)
    if not isinstance(content, list) or not content or not all(isinstance(row, dict) for row in content):
        raise UserError(f'{path}: a table in json is a list of objects: [{{"file": "a.jpg", "label": "cat"}}, ...]')

    def text(value: object) -> str:
        if isinstance(value, list):
            return "".join(f"{text(one)}{END}" for one in value)
        return value.strip() if isinstance(value, str) else "" if value is None else json.dumps(value)

    header = list(dict.fromkeys(key for row in content for key in row))
    return header, [(n, {key: text(row.get(key)) for key in header}) for n, row in enumerate(content, 1)]


def coded(there: Iterable[int], size: int) -> bytes:
    """The label of a picture that shows the classes `there` of `size`."""
    known = set(there)
    return bytes(k in known for k in range(size))


def recoded(label: int | bytes, new: Sequence[int], size: int) -> int | bytes:
    """The label where class i is called new[i] of `size`."""
    if isinstance(label, bytes):
        return coded((new[i] for i, one in enumerate(label) if one), size)
    return new[label] if label >= 0 else -1


def strata(labels: Sequence[int | bytes]) -> np.ndarray:
    """(N,) the class by which a sample is held out: its own; of several the rarest, -1 for none."""
    if not labels or not isinstance(labels[0], bytes):
        return np.array(labels, dtype=np.int64)
    hot = np.frombuffer(b"".join(labels), dtype=np.uint8).reshape(len(labels), -1)
    return np.where(hot.any(1), np.where(hot, hot.sum(0, dtype=np.int64), len(hot) + 1).argmin(1), -1)
