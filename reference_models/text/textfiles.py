"""Text and JSON read within limits, with errors that name file and line; files written so that a
crash leaves the old or the new."""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reference_models.errors import ModelError

LIMIT = 256 << 20  # bytes; the largest vocabulary known has 35 million


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, without a byte order mark. Raises ModelError naming the file (and
    the line of the first bad byte); for a pipe or a device too, and for one of over 256 MiB."""
    try:
        # not waiting for the other end of a pipe
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > LIMIT:
                what = f"is longer than {LIMIT >> 20} MiB" if status.st_size > LIMIT else "is a pipe or a device"
                raise ModelError(f"{path}: {what}; this is no such file")
            return decode_utf8(file.read(), path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None


def decode_utf8(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ModelError(f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from None


def read_json(path: Path, unique: bool = False, kind: type = dict) -> Any:
    """A JSON file whose outermost value is an object, or a list with kind=list; unique refuses an
    object with a key twice, of which json would take the last. Raises ModelError naming the file
    and the line or the key; for half a character (a surrogate alone) too."""
    hook = (lambda pairs: _unique(pairs, path)) if unique else None
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=hook)
        if re.search(r"\\u[dD]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ModelError(f"{path}: {half} in a text is half a character; correct it") from None
    except ModelError:
        raise
    # nested too deep; a number of thousands of digits
    except (RecursionError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        raise ModelError(f"{path}: expected a JSON {wanted}, found a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, object]], path: Path) -> dict:
    """In a vocabulary the last of two equal keys silently moves a token, in an index a tensor."""
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ModelError(f"{path}, key {twice!r}: occurs twice")
    return value


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target, flush to disk, rename over it."""
    replace_file(path, lambda temporary: temporary.write_bytes(data))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """The same for `write`, which makes the file it is given; umask says who else may read it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would make the file its owner's alone
        write(temporary)
        os.chmod(temporary, mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
