"""Moved: `python -m minilora.commands.shards`."""

import sys

print("error: minilora.data.shards is now: python -m minilora.commands.shards", file=sys.stderr)
sys.exit(2)
