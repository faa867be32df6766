"""Processes that make batches, each with a pipe of its own and nothing else in common.

Worker k of n makes batches k, k + n, ..., at most AHEAD before they are wanted. What is large in
one comes in a file without a name (memfd), which takes no room in /dev/shm: a container has 64 MB
there, and 64 pictures take 38. A worker that dies closes its pipe, so nobody waits for it. However
the loop ends, the workers are killed; they hold nothing.
"""

import contextlib
import mmap
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe, Process, reduction, util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.errors import LostWorker

AHEAD = 2  # as torch's DataLoader
LARGE = 1 << 16  # bytes of an array that does not go through the pipe
inside = False  # whether this process is a worker
ours: set = set()  # this process's ends of the pipes, of which workers inherit copies


def in_workers(make: Callable[[Any], dict], batches: Sequence, workers: int) -> Iterator[dict]:
    """make(batch) of every batch, in order; what it raises is raised here. LostWorker where one
    was killed, most often for want of memory, or cannot be started."""
    crew: list[tuple] = []
    dismiss = util.Finalize(None, _kill, (crew,), exitpriority=10)  # at the latest when Python ends
    try:
        for k in range(workers):
            crew.append(_hire(make, batches[k::workers]))
        for number in range(len(batches)):
            made = _receive(*crew[number % workers])
            if isinstance(made, Exception):
                raise made
            yield made
    finally:
        dismiss()


def _hire(make: Callable[[Any], dict], batches: Sequence) -> tuple:
    pipe, theirs = Pipe()
    ours.add(pipe)
    with theirs:
        process = Process(target=_work, args=(make, batches, theirs), daemon=True)
        try:
            process.start()
        except OSError as error:
            reason = f"no process that reads pictures can be started: {error.strerror}"
            raise LostWorker(f"{reason}; try --workers 0") from None
    return process, pipe


def _kill(crew: list[tuple]) -> None:
    for process, _ in crew:
        process.kill()
    for process, pipe in crew:
        process.join()
        pipe.close()
        ours.discard(pipe)


def _work(make: Callable[[Any], dict], batches: Sequence, pipe: Any) -> None:
    """A worker's life. SIGINT and SIGTERM, sent to all, are the main process's to answer."""
    global inside
    inside = True
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    for copy in ours:  # else the end of the main process would not be noticed
        copy.close()
    torch.set_num_threads(1)
    with contextlib.suppress(OSError, EOFError):  # the main process is gone
        for number, batch in enumerate(batches):
            if number >= AHEAD:
                pipe.recv_bytes()  # one was taken
            try:
                made = {k: x.numpy() if isinstance(x, Tensor) else x for k, x in make(batch).items()}
            except Exception as error:
                error.add_note(traceback.format_exc())
                made = error
            _send(pipe, made)
        while True:  # a pipe that is closed with something unread in it loses the rest
            pipe.recv_bytes()


def _send(pipe: Any, made: dict | Exception) -> None:
    """A message, and then, where arrays are large, the descriptor of the file that holds them."""
    large: list[memoryview] = []
    message = pickle.dumps(made, 5, buffer_callback=lambda x: x.raw().nbytes < LARGE or large.append(x.raw()))
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(os.memfd_create("batch"), "wb", buffering=0)) if large else None
            for data in large:
                for start in range(0, data.nbytes, 1 << 30):
                    file.write(data[start : start + (1 << 30)])
                file.write(bytes(-data.nbytes % 64))
            if file and file.tell() < sum(data.nbytes for data in large):
                raise OSError("no room")
        except (OSError, AttributeError):  # no such files, or no room: all through the pipe, slowly
            message, large = pickle.dumps(made, 5), []
        pipe.send_bytes(pickle.dumps((message, [data.nbytes for data in large])))
        if large:
            reduction.send_handle(pipe, file.fileno(), None)


def _receive(process: Process, pipe: Any) -> dict | Exception:
    large, start = [], 0
    try:
        message, sizes = pickle.loads(pipe.recv_bytes())
        if sizes:
            with open(reduction.recv_handle(pipe), "r+b", buffering=0) as file:
                memory = memoryview(mmap.mmap(file.fileno(), 0))
        with contextlib.suppress(OSError):
            pipe.send_bytes(b"")
    except (EOFError, OSError, RuntimeError) as error:
        process.join(1)
        code = process.exitcode or 0
        how = f"exit code {code}" if code else str(error)
        how = f"signal {-code}" + ", as when memory runs out" * (code == -signal.SIGKILL) if code < 0 else how
        raise LostWorker(f"a process that reads pictures was ended ({how}); try fewer --workers, 0 for none") from error
    for size in sizes:
        large.append(memory[start : start + size])
        start += size + -size % 64
    made = pickle.loads(message, buffers=large)
    if isinstance(made, Exception):
        return made
    return {k: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for k, x in made.items()}
