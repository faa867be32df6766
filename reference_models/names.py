"""Moved: `python -m minilora.commands.rename_adapter SRC DST --layout ...`."""

import sys

if __name__ != "__main__":
    raise ImportError("reference_models.names is now reference_models.files.names")
NOW = "python -m minilora.commands.rename_adapter SRC DST --layout ..."
print(f"error: reference_models.names is now: {NOW}", file=sys.stderr)
sys.exit(2)
