"""Moved: `python -m minilora.commands.download`."""

import sys

if __name__ != "__main__":
    raise ImportError("minilora.data.download is now minilora.commands.download")
print("error: minilora.data.download is now: python -m minilora.commands.download", file=sys.stderr)
sys.exit(2)
