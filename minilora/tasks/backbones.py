"""Moved: `python -m minilora.commands.backbones`."""

import sys

if __name__ != "__main__":
    raise ImportError("minilora.tasks.backbones is now minilora.commands.backbones")
print("error: minilora.tasks.backbones is now: python -m minilora.commands.backbones", file=sys.stderr)
sys.exit(2)
