"""The number of threads: what the user says, else what stands still about the machine."""

import os

import pytest
import torch

from minilora.speed import threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of four processors on two cores, without a quota, of which this process may use all."""
    before = torch.get_num_threads()
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr(threads, "CPUS", tmp_path)
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield monkeypatch
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("allowed", "quota", "expected"),
    [
        ({0, 1, 2, 3}, None, 2),
        ({0, 2}, None, 1),
        ({0, 3}, None, 2),
        ({0, 1, 2, 3}, "max 100000", 2),
        ({0, 1, 2, 3}, "150000 100000", 1),
        ({0, 1, 2, 3}, "50000 100000", 1),
        ({0, 1, 2, 3}, "900000 100000", 2),
        ({0, 1, 7, 8}, None, 4),
    ],
)
def test_a_core_counts_once_and_a_container_no_more_than_its_share(machine, allowed, quota, expected):
    machine.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
    if quota:
        threads.QUOTA.write_text(f"{quota}\n")
    assert threads.available_cores() == expected
    assert threads.set_threads() == torch.get_num_threads() == expected


def test_a_wish_counts_before_the_environment_and_the_environment_before_the_cores(machine):
    torch.set_num_threads(3)
    machine.setenv("OMP_NUM_THREADS", "3")
    assert threads.set_threads() == 3
    assert threads.set_threads(1) == torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("running", "expected"),
    [("1", ("GOMP_SPINCOUNT", "3000")), ("3", ("GOMP_SPINCOUNT", "3000")), ("4", ("OMP_WAIT_POLICY", "PASSIVE"))],
)
def test_threads_sleep_where_others_want_the_processors_and_spin_where_none_do(machine, tmp_path, running, expected):
    """Two cores of four processors: up to two other threads have processors of their own."""
    machine.setattr(os, "environ", {})
    machine.setattr(os, "cpu_count", lambda: 4)
    machine.setattr(threads, "LOAD", tmp_path / "loadavg")
    threads.LOAD.write_text(f"0.20 0.18 0.12 {running}/80 11206\n")
    threads.settle_waiting()
    assert os.environ == dict([expected])


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_how_threads_wait_is_the_users_to_say(machine, given):
    machine.setattr(os, "environ", dict(given))
    threads.settle_waiting()
    assert os.environ == given


def test_where_the_load_is_not_known_threads_spin(machine, tmp_path):
    machine.setattr(os, "environ", {})
    machine.setattr(threads, "LOAD", tmp_path / "none")
    threads.settle_waiting()
    assert "GOMP_SPINCOUNT" in os.environ
