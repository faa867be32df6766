"""SIGTERM and SIGINT ask a run to stop after the present optimizer step, with a checkpoint."""

import os
import signal
import threading
import time

CAUGHT = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 2.0


class Interrupted(SystemExit):
    """The run was asked to stop and has written its checkpoint; exit code 128 + signal
    number, as in a shell."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class StopSignals:
    """Context manager: `signum` becomes the first signal caught; a second one ends the
    process at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._caught_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        # elsewhere Python allows no handler
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._catch) for s in CAUGHT}
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _catch(self, signum: int, frame: object) -> None:
        # torchrun passes a Ctrl-C on to processes that got it from the terminal already: an echo,
        # not a second request
        echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._caught_at < ECHO_SECONDS
        if self.signum is None:
            self.signum, self._caught_at = signum, time.monotonic()
        elif not echo:
            os._exit(128 + signum)
