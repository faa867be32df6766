"""Text files read with errors that name file and line, and written so that a crash leaves the old file or the new."""

import json
import os
from collections import Counter
from pathlib import Path

from reference_models.errors import ModelError


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises ModelError naming the file (and the line of the first bad byte)."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
    return decode_utf8(data, path)


def decode_utf8(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ModelError(f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from None


def read_object(path: Path) -> dict:
    """A JSON file whose outermost value is an object with every key once. Raises ModelError naming file and line."""
    try:
        value = json.loads(read_text(path), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except RecursionError:
        raise ModelError(f"{path}: JSON nested too deep") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, object]], path: Path) -> dict:
    """json would let the last of two equal keys win, which in a vocabulary silently moves a token."""
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ModelError(f"{path}, key {twice!r}: occurs twice")
    return value


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target, flush to disk, rename over it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
