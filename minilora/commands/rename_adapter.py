"""Rename an adapter between transformers 4 and 5, of which PEFT refuses the other's names.

python -m minilora.commands.rename_adapter SRC DST --layout transformers5
"""

import argparse
import sys

from reference_models import ModelError
from reference_models.files.rename_adapter import FAMILIES, LAYOUTS, convert


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minilora.commands.rename_adapter", description=__doc__.split("\n")[0]
    )
    parser.add_argument("source", metavar="SRC", help="directory of the adapter")
    parser.add_argument("target", metavar="DST", help="directory to write")
    parser.add_argument("--layout", required=True, help=" or ".join(LAYOUTS))
    parser.add_argument("--family", choices=list(FAMILIES), help="where the names fit several families")
    args = parser.parse_args(arguments)
    try:
        count = convert(args.source, args.target, args.layout, args.family)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.target}: {count} tensors renamed" if count else f"{args.target}: the names were right already")


if __name__ == "__main__":
    main()
