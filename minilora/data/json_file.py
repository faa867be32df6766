"""Read one json file, or say in one line which place of it is wrong."""

import json
from pathlib import Path
from typing import Any

from minilora.errors import UserError


def read_json(path: Path) -> Any:
    """The content of a json file in UTF-8, with or without a byte order mark.

    Raises UserError naming the file and the place that is wrong.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise UserError(f"{path}: cannot be read: not UTF-8: {where}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: cannot be read: broken json at {where}: {error.msg}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise UserError(f"{path}: cannot be read: broken json: nested too deep") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: cannot be read: broken json: {error}") from None
