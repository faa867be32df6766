"""Runs that are killed, starved of disk space or told to stop: nothing is lost, and the end has the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def laboratory(folder, *command, seconds=300):
    """Findings of a scenario of tests/support/process_lab.py."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.process_lab", str(folder), *command],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_anywhere_the_newest_checkpoint_loads_and_the_run_ends_with_the_same_bits(tmp_path):
    found = laboratory(tmp_path, "kills", "every=24", "sizes=3", "randoms=2")
    assert found["complaints"] == []
    assert found["killed"] >= 11 and found["operations"] > 150


@pytest.mark.slow
def test_killed_at_every_file_operation(tmp_path):
    found = laboratory(tmp_path, "kills", "every=1", "sizes=30", "randoms=60", seconds=1800)
    assert found["complaints"] == []
    assert found["killed"] >= 200


def test_disk_full_is_one_line_and_exit_1_and_the_run_goes_on_later(tmp_path):
    found = laboratory(tmp_path, "disk_full")
    assert found["complaints"] == []
    assert set(found["statuses"]) == {1}
    for message in found["messages"]:
        assert "file too large" in message.lower() and len(message.splitlines()) == 1


def test_sigterm_and_sigint_write_a_checkpoint_within_a_step(tmp_path):
    """Exit codes 143 and 130, also when the data loader's workers get the signal; a second signal ends at once."""
    found = laboratory(tmp_path, "signals")
    assert found["complaints"] == []
    assert found["SIGTERM"] == found["SIGTERM to workers too"] == [143, "step-3"]
    assert found["SIGINT"] == found["SIGINT to workers too"] == [130, "step-3"]
    assert found["twice"] == [143, True]
