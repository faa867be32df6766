"""SIGTERM and SIGINT end a program where it is; an optimizer step is finished first.

Whether it lists files, encodes, validates or writes its report, a signal raises Interrupted there.
What may not be torn runs inside `held()`, at whose end the signal counts. A second one ends the
process without more ado.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

CAUGHT = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 2.0


class Interrupted(SystemExit):
    """The program was asked to stop; exit code 128 + signal number, as in a shell."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class StopSignals:
    """Context manager, which may be entered again inside: `signum` becomes the first signal caught.
    A program and what it calls share one."""

    active: "StopSignals | None" = None

    def __init__(self) -> None:
        self.signum: int | None = None
        self._caught_at, self._held, self._entered = 0.0, 0, 0
        self._previous: dict[int, object] = {}

    @classmethod
    def shared(cls) -> "StopSignals":
        return cls.active or cls()

    def __enter__(self) -> "StopSignals":
        self._entered += 1
        # elsewhere Python allows no handler
        if StopSignals.active is None and threading.current_thread() is threading.main_thread():
            StopSignals.active = self
            self._previous = {s: signal.signal(s, self._catch) for s in CAUGHT}
        return self

    def __exit__(self, *exc: object) -> None:
        self._entered -= 1
        if StopSignals.active is self and not self._entered:
            StopSignals.active = None
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)

    @contextmanager
    def held(self, ends: bool = True) -> Iterator[None]:
        """Inside, a signal waits: for the end, or with ends=False for the next `check`."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if ends:
            self.check()

    def check(self) -> None:
        if self.signum is not None and not self._held:
            raise Interrupted(self.signum)

    def _catch(self, signum: int, frame: object) -> None:
        # torchrun passes a Ctrl-C on to processes that got it from the terminal already: an echo,
        # not a second request
        echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._caught_at < ECHO_SECONDS
        if self.signum is None:
            self.signum, self._caught_at = signum, time.monotonic()
            self.check()
        elif not echo:
            os._exit(128 + signum)
