"""SIGTERM and SIGINT in every phase of a run: at once, exit 143 or 130, and the bits of a run that was left alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from minilora.signals import Interrupted, StopSignals
from tests.support.cli_data import QUICK, ROOT, write_photos

EARLY = {"listing": None, "first batch": None, "encoding": None}  # nothing was learned yet
LATE = {"step": "step-3", "first validation": "step-5", "last validation": "step-10", "test": "step-10"}
SOME = ("listing", "encoding", "step", "last validation", "test")


def laboratory(folder, signum, phases, seconds=600):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.stop_lab", str(folder), str(int(signum)), *phases],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("signum", "phases"),
    [
        (signal.SIGTERM, SOME),
        pytest.param(signal.SIGTERM, (*EARLY, *LATE, "report"), marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, (*EARLY, *LATE, "report"), marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_any_phase_ends_the_run_there_and_nothing_is_lost(tmp_path, signum, phases):
    found = laboratory(tmp_path, signum, phases)
    for phase in phases:
        code, quick, newest, told, left, equal = found[phase]
        assert code == 128 + signum and quick and equal and left == [], (phase, found[phase])
        assert newest == (EARLY | LATE | {"report": "step-10"})[phase], (phase, newest)
        assert told == (phase != "listing"), phase


def test_a_signal_waits_for_what_may_not_be_torn():
    done, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught, StopSignals() as signals:
        with signals.held():
            with signals.held():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("never")
    assert done == ["inner", "outer"] and caught.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before and StopSignals.active is None


def test_one_that_waits_for_a_check_and_an_error_goes_first():
    with StopSignals() as signals:
        with signals.held(ends=False):
            os.kill(os.getpid(), signal.SIGTERM)
            with signals.held():
                pass
        with pytest.raises(Interrupted):
            signals.check()
    with StopSignals() as signals, pytest.raises(KeyError), signals.held():
        os.kill(os.getpid(), signal.SIGTERM)
        raise KeyError("goes first")


def test_a_program_and_its_trainer_share_one_and_other_threads_have_none():
    with StopSignals.shared() as outer:
        with StopSignals.shared() as inner:
            assert inner is outer
        assert StopSignals.active is outer
    seen = []

    def elsewhere():
        with StopSignals.shared():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL] and StopSignals.active is None


def started(words, until: str, **options) -> subprocess.Popen:
    """train.py, which has just printed `until`."""
    process = subprocess.Popen(
        [sys.executable, "-u", "train.py", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    for line in process.stdout:
        if until in line:
            return process
    raise AssertionError(f"ended with {process.wait()} before {until!r}")


@pytest.mark.slow
def test_a_real_program_while_it_imports_and_twice_while_it_trains(tmp_path):
    """While torch is imported there is no traceback; the second SIGINT ends at once, without a word."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, "train.py"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        time.sleep(0.5)
        process.send_signal(signum)
        assert process.wait(20) == 128 + signum and "Traceback" not in process.stderr.read()
    photos = write_photos(tmp_path / "photos", train=5, val=2, classes=3)
    words = [*QUICK, "--data-dir", photos, "--epochs", "1000", "--log-interval", "1", "--output", tmp_path / "run"]
    process = started(words, "step 3/")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


@pytest.mark.slow
def test_the_whole_group_gets_the_signal_and_the_workers_leave_the_answer_to_the_run(tmp_path):
    photos = write_photos(tmp_path / "photos", train=30, val=2, classes=3)
    words = [*QUICK, "--data-dir", photos, "--epochs", "1000", "--log-interval", "1", "--workers", "2"]
    process = started([*words, "--output", tmp_path / "run"], "step 3/", start_new_session=True)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.stdout.read()
    assert process.wait(10) == 143 and "stopped by signal 15 after step" in said and "Traceback" not in said
