"""Write files so that at every moment either the old or the new content is there, whole.

The content goes under a temporary name beside the target, is flushed to the disk, and is then
renamed; on failure the temporary file is removed.
"""

import errno
import hashlib
import io
import json
import os
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save

from minilora.errors import RunError


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data`, a text in UTF-8, to `path`, replacing what was there. RunError where the disk
    is full; then the old file stays intact."""
    path = Path(path)
    data = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise not_written(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def not_written(path: Path, error: OSError) -> RunError:
    """What to say where a file could not be written."""
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        reason = "no space left" if error.errno == errno.ENOSPC else os.strerror(error.errno).lower()
        return RunError(f"{path}: {reason}; what was saved before is intact; make room and start again")
    return RunError(f"{path} cannot be written: {os.strerror(error.errno or 0)}")


def file_sha256(path: Path) -> str:
    """What the content of a file is known by again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Flush a directory's list of names, so that a rename outlives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_safetensors(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors, atomically, as safetensors (https://github.com/huggingface/safetensors)."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, save(whole, metadata={"format": "pt"}))


def write_png(path: str | Path, image: Image.Image) -> None:
    """Write a picture, atomically."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    atomic_write(path, buffer.getvalue())


def write_json(path: str | Path, value) -> None:
    """Write a value as indented json, atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
