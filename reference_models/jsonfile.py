"""Read a json file with an error that names it."""

import json
from pathlib import Path

from reference_models.errors import ModelError


def read_json(path: Path) -> dict:
    """The object in a json file; ModelError names the file and the position of what is wrong."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as json: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: a json object was expected, found {type(data).__name__}")
    return data
