"""One training at a time in a run directory: run.lock names its process, host and time.

The lock is the kernel's (flock), which takes it back however the process ends. Not every file
system that hosts share passes it on: the process of another host is gone when for an hour neither
the lock nor train.log was written.
"""

import errno
import fcntl
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from minilora.atomic import not_written
from minilora.errors import UserError

FILE, GONE = "run.lock", 3600  # seconds
held: dict[Path, IO] = {}  # by this process


def take(run_dir: Path) -> str | None:
    """Locks a directory until `release`, or the end of the process; returns a line about a stale
    lock that was taken over. UserError where another process trains there."""
    path = run_dir.resolve() / FILE
    while path not in held:
        try:
            file = open(path, "a+", encoding="utf-8", errors="replace", opener=_without_waiting)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise not_written(path, error) from None
            raise UserError(f"{path}: is no lock of a run ({error.strerror or error}); remove it") from None
        who = _holder(file, run_dir)
        if who:
            file.close()
            raise UserError(
                f"{run_dir}: {who} trains there now; wait for it, stop it, or choose another --output (if it is gone, "
                f"remove {path})"
            )
        try:
            there = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            there = False
        if not there:  # its owner has just removed it
            file.close()
            continue
        left = _said(file)[1]
        file.truncate(0)
        host = socket.gethostname()
        who = f"process {os.getpid()} on {host} since {time.strftime('%Y-%m-%d %H:%M')}"
        held[path] = file
        try:
            print(host, who, sep="\n", file=file, flush=True)
        except OSError as error:
            release()
            raise not_written(path, error) from None
        return f"{run_dir}: {left} has left its lock behind; taken over" if left else None
    return None


def release() -> None:
    """Gives free what this process has locked."""
    while held:
        path, file = held.popitem()
        path.unlink(missing_ok=True)
        with suppress(OSError):  # what a full disk has not taken
            file.close()


def at_work(run_dir: Path) -> str | None:
    """The other process that trains in a directory now."""
    path = run_dir.resolve() / FILE
    if path in held or not path.is_file():
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        return _holder(file, run_dir)


def _holder(file: IO, run_dir: Path) -> str | None:
    """The process at work that a lock names, None where it was free, and is now ours."""
    host, who = _said(file)
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if file.writable() else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return who or "another process"
    except OSError:  # a file system without locks
        pass
    log = run_dir / "train.log"
    written = max(os.fstat(file.fileno()).st_mtime, log.stat().st_mtime if log.is_file() else 0)
    return who if who and host != socket.gethostname() and time.time() - written < GONE else None


def _said(file: IO) -> tuple[str, str]:
    """(host, sentence) of a lock, empty for a damaged one."""
    file.seek(0)
    host, _, who = file.read(400).partition("\n")
    who = who.strip()
    return (host, who) if re.fullmatch(r"process \d+ on [\w.-]+ since [\d :-]+", who, re.ASCII) else ("", "")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)
