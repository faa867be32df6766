"""Moved: `python -m minilora.commands.rename_adapter SRC DST --layout ...`."""

import sys

if __name__ != "__main__":
    raise ImportError("reference_models.names is now reference_models.files.names")
print(
    "error: reference_models.names is now: python -m minilora.commands.rename_adapter SRC DST --layout ...",
    file=sys.stderr,
)
sys.exit(2)
