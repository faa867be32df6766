"""One training at a time in a run directory; what a killed one leaves behind is reported and taken over."""

import os
import signal
import socket
import time

import pytest

from minilora.errors import UserError
from minilora.settings.flags import Config
from minilora.tasks import lock
from minilora.tasks.rundir import open_run_dir
from tests.support.process_lab import fork, join


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    lock.release()


def taking(run, seconds=0.0):
    line = lock.take(run)
    if seconds:
        (run / "taken").touch()
        time.sleep(seconds)
    lock.release()
    return line


def other(run, seconds=60.0):
    """A process that trains in `run`, once it does."""
    child = fork(taking, run, seconds)
    until = time.monotonic() + 20
    while not (run / "taken").exists() and time.monotonic() < until:
        time.sleep(0.01)
    return child


def leave(run, pid=4711, host=None):
    """A lock that nobody holds."""
    host = host or socket.gethostname()
    (run / lock.FILE).write_text(f"{host}\nprocess {pid} on {host} since 2026-01-02 03:04\n")


def test_a_second_process_is_refused_with_the_first_one_s_number_host_and_time(tmp_path):
    child = other(tmp_path)
    named = rf"process {child[0]} on {socket.gethostname()} since 20[\d :-]+"
    with pytest.raises(UserError, match=f"{named} trains there now; wait for it, stop it, or choose another"):
        lock.take(tmp_path)
    assert f"process {child[0]}" in lock.at_work(tmp_path)
    os.kill(child[0], signal.SIGKILL)
    join(child)
    assert lock.at_work(tmp_path) is None
    assert f"process {child[0]}" in lock.take(tmp_path) and lock.at_work(tmp_path) is None
    lock.release()
    assert not (tmp_path / lock.FILE).exists() and lock.take(tmp_path) is None


def test_the_first_files_of_another_process_are_its_run_not_something_foreign(tmp_path):
    """It has the lock, and its config.toml is about to be there: so this one is told who trains there."""
    child = other(tmp_path)
    with pytest.raises(UserError, match=f"process {child[0]} on .* trains there now"):
        open_run_dir(Config(output=str(tmp_path)), {"weights": "none"})
    os.kill(child[0], signal.SIGKILL)
    join(child)
    with pytest.raises(UserError, match="is not empty and holds no run"):
        open_run_dir(Config(output=str(tmp_path)), {"weights": "none"})


def between(run):
    """When this process had the directory."""
    lock.take(run)
    began = time.monotonic()
    time.sleep(0.2)
    ended = time.monotonic()
    lock.release()
    return began, ended


def test_two_that_begin_at_once_are_never_both_in(tmp_path):
    for _ in range(4):
        answers = [join(child) for child in [fork(between, tmp_path) for _ in range(4)]]
        assert {code for code, _ in answers} <= {0, 2}
        times = sorted(answer for code, answer in answers if code == 0)
        assert times and all(one[1] <= next_one[0] for one, next_one in zip(times, times[1:], strict=False))


def test_one_process_may_take_it_twice(tmp_path):
    assert lock.take(tmp_path) is None and lock.take(tmp_path / "." / "x" / "..") is None
    lock.release()
    assert not lock.held


def test_another_host_counts_as_gone_when_nothing_was_written_for_an_hour(tmp_path):
    """A process of this host that is gone, its number given to another one since, is gone at once."""
    leave(tmp_path, pid=os.getppid())
    assert lock.at_work(tmp_path) is None and "taken over" in lock.take(tmp_path)
    lock.release()
    leave(tmp_path, host="elsewhere")
    assert "process 4711 on elsewhere since 2026-01-02 03:04" == lock.at_work(tmp_path)
    with pytest.raises(UserError, match="4711 on elsewhere .* trains there now.*if it is gone, remove .*run.lock"):
        lock.take(tmp_path)
    os.utime(tmp_path / lock.FILE, (time.time() - 3601,) * 2)
    assert lock.at_work(tmp_path) is None
    (tmp_path / "train.log").touch()
    assert lock.at_work(tmp_path) is not None
    os.utime(tmp_path / "train.log", (time.time() - 3601,) * 2)
    assert "4711 on elsewhere" in lock.take(tmp_path)


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def flock(file, kind):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    assert lock.take(tmp_path) is None
    lock.release()
    leave(tmp_path, host="elsewhere")
    with pytest.raises(UserError, match="elsewhere"):
        lock.take(tmp_path)


@pytest.mark.parametrize("what", ["fifo", "folder", "link"])
def test_something_else_of_that_name_is_one_line_and_no_wait(tmp_path, what):
    path = tmp_path / lock.FILE
    {"fifo": os.mkfifo, "folder": os.mkdir, "link": lambda p: os.symlink("/etc/passwd", p)}[what](path)
    with pytest.raises(UserError, match="is no lock of a run .*; remove it"):
        lock.take(tmp_path)
    assert lock.at_work(tmp_path) is None


DAMAGED = ["", "a", "a\nprocess x on y", "a\n\x1b[2Jprocess 1 on a since 2026", "\xff" * 999, "\n" * 9]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_lock_that_nobody_holds_is_free(tmp_path, text):
    (tmp_path / lock.FILE).write_text(text)
    assert lock.at_work(tmp_path) is None and lock.take(tmp_path) is None
    assert f"process {os.getpid()} on " in (tmp_path / lock.FILE).read_text()
