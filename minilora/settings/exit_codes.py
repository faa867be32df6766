"""What every program does around its work: exit codes and one sentence instead of tracebacks.

0 done; 1 a run that failed; 2 a user's mistake; 128 + N stopped by signal N (130 Ctrl-C, 143
SIGTERM); 141 the reader of the output has gone.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence

from minilora import ticker
from minilora.errors import RunError, UserError
from minilora.signals import Interrupted, StopSignals
from minilora.textfiles import printable

LONGEST = 4000  # letters of a message that quotes a file's


def begin(read: Callable[[Sequence[str] | None], object]) -> None:
    """Before what takes seconds to import: from here on signals count, and `read` has answered
    --help and mistyped flags."""
    StopSignals.shared().__enter__()
    if code := run(lambda argv: read(argv) and 0, (UserError,)):
        sys.exit(code)


def run(main: Callable[[Sequence[str] | None], int], user_errors: tuple[type[Exception], ...]) -> int:
    """`main`'s exit code; errors that people can act on, and signals, become one line on stderr."""
    downloads, shown = logging.getLogger("reference_models"), logging.StreamHandler()
    downloads.addHandler(shown)
    downloads.setLevel(logging.INFO)
    ticker.visible = True
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is no reason to end
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with StopSignals.shared():
            return main(None)
    except user_errors as error:
        return _complain(str(error), 2)
    except RunError as error:
        return _complain(str(error), 1)
    except (KeyboardInterrupt, Interrupted) as stop:
        return _complain("interrupted", getattr(stop, "code", 130))
    except BrokenPipeError:  # the reader of the output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error):
            raise
        return _complain("out of memory; try a smaller --batch-size, --amp bf16, or another --device", 1)
    except OSError as error:
        return _complain(f"{error.filename or 'input or output'}: {error.strerror or error}", 1)
    finally:
        downloads.removeHandler(shown)
        ticker.visible = False


def _complain(message: str, code: int) -> int:
    cut = f" ... ({len(message):,} letters)" * (len(message) > LONGEST)
    print(f"error: {printable(message[:LONGEST])}{cut}", file=sys.stderr)
    return code
