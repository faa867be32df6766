"""Text from strangers: small files read within limits, names printed so that nothing in them acts,
cells that no spreadsheet takes for a formula."""

import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minilora.errors import UserError

SMALL = 64 << 20  # bytes: configurations, labels, vocabularies
DATA = 4 << 30  # questions, answers and tables of a data set
JOINERS = "\u200c\u200d\u00ad"  # invisible, and part of words and emoji
FORMULA = re.compile("'*[=+\\-@\t\r\uff1d\uff0b\uff0d\uff20]")
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?")


def read_bytes(path: str | Path, limit: int = SMALL) -> bytes:
    """The content of a file. UserError for one that cannot be read, for a pipe or a device, which
    could be waited for for ever, and for more than `limit` bytes."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path}: cannot be read (it is a pipe or a device, not a file)")
            if status.st_size > limit:
                raise UserError(f"{path}: cannot be read: {status.st_size >> 20} MiB; at most {limit >> 20} are read")
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: str | Path, limit: int = SMALL, encoding: str = "utf-8-sig") -> str:
    """The text of a file in UTF-8, byte order mark or none; UserError names the first bad byte."""
    try:
        return read_bytes(path, limit).decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        where = f"byte {error.object[error.start]:#04x} at {error.start}, line {line}"
        raise UserError(f"{path}: cannot be read: not UTF-8: {where}; save the file as UTF-8") from None


def read_json(path: str | Path, limit: int = SMALL) -> Any:
    """The value in a json file. UserError names the file and the place that is wrong, or half a
    character (a surrogate alone), which no file could hold again."""
    text = read_text(path, limit)
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD]", text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        why = f"broken json at line {error.lineno}, column {error.colno}: {error.msg}"
    except UnicodeEncodeError as error:
        why = f"{ascii(error.object[error.start])} in a text is half a character; correct it"
    except RecursionError:
        why = "broken json: nested too deep"
    except ValueError as error:  # a number of thousands of digits
        why = f"broken json: {error}"
    raise UserError(f"{path}: cannot be read: {why}")


def printable(text: object) -> str:
    r"""One line in which every character is seen: what would move the cursor, end the line, turn
    the direction of writing or is no character becomes \x1b, \n, \u202e, \udcff. Names of files,
    classes and tensors are quoted in messages, tables and pages, and may be anybody's."""
    text = str(text)
    return text if text.isprintable() else "".join(c if _seen(c) else repr(c)[1:-1] for c in text)


def _seen(c: str) -> bool:
    return c.isprintable() or c in JOINERS or unicodedata.category(c) == "Zs"


def encodable(text: str) -> str:
    """The text with the bytes of a file name that are no UTF-8 as %FF, which is a name again."""
    return re.sub("[\ud800-\udfff]", lambda half: f"%{ord(half[0]) & 255:02X}", text)


def csv_text(rows: Iterable[Sequence], guard: bool = True) -> str:
    """Rows as csv. guard: a text that a spreadsheet would run as a formula gets an apostrophe in
    front, which `from_cell` takes away again."""
    return "".join(",".join(_cell(value, guard) for value in row) + "\n" for row in rows)


def _cell(value: object, guard: bool) -> str:
    text = encodable(str(value))
    if guard and isinstance(value, str) and FORMULA.match(text) and not NUMBER.fullmatch(text):
        text = f"'{text}"
    return '"' + text.replace('"', '""') + '"' if re.search('[,"\r\n]', text) else text


def from_cell(text: str) -> str:
    """A cell's text without the apostrophe of `csv_text`."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text
