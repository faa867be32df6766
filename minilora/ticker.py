"""How far a long loop is: a bar on a terminal, a line every few seconds elsewhere.

    for batch in ticker.through(batches, "encoding", total):

Programs switch it on (`ticker.visible = True`); calls from a library print nothing. It all goes to
stderr, so that what a program prints for other programs stays as it is.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from minilora.textfiles import printable

T = TypeVar("T")

visible = False
EVERY = 5.0  # seconds between lines; what ends sooner says nothing


def clock(seconds: float) -> str:
    """h:mm:ss"""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def through(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The items, one by one. total: how many there will be; of a list it need not be said."""
    total, title = len(items) if isinstance(items, Sized) else total, printable(title)
    if not visible or os.environ.get("RANK", "0") != "0":
        yield from items
    elif (bar := terminal_bar(title, total)) is not None:
        with bar:
            for item in items:
                yield item
                bar.update()
    else:
        started = told = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - told >= EVERY and done != total:
                told, passed = now, now - started
                left = f" of {total:,}, left {clock(passed / done * (total - done))}" if total else ""
                print(f"{title}: {done:,}{left} after {clock(passed)}", file=sys.stderr, flush=True)


def terminal_bar(title: str, total: int | None):
    """tqdm's bar that vanishes when it is done; None without a terminal or without tqdm."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=title, leave=False, dynamic_ncols=True)
