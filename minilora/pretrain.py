"""Moved: `python -m minilora.commands.pretrain`."""

import sys

if __name__ != "__main__":
    raise ImportError("minilora.pretrain is now minilora.commands.pretrain")
print("error: minilora.pretrain is now: python -m minilora.commands.pretrain", file=sys.stderr)
sys.exit(2)
