"""minilora/training/distributed.py: several processes compute what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from minilora.training import checkpoint, distributed
from tests.training.test_faults import laboratory

ROOT = Path(__file__).parents[2]


def test_alone_every_function_is_that_of_one_process():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    assert torch.equal(distributed.all_sum(torch.ones(2)), torch.ones(2))
    module = torch.nn.Linear(1, 1)
    assert distributed.wrap(module) is module
    assert distributed.start("cpu") == torch.device("cpu")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("items", [1, 7, 24, 29])
def test_shares_cover_the_epoch_once_and_weigh_every_item_equally(monkeypatch, world, accumulate, items):
    order = list(range(items))
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    size = 3 * distributed.turns(accumulate)
    batches = [order[i : i + size] for i in range(0, items, size)]
    shares = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share_steps(batches, accumulate))
    assert len({len(share) for share in shares}) == 1, "every process takes as many steps"
    seen = []
    for steps in zip(*shares, strict=True):
        assert all(step.batches for step in steps), "every process takes part in the exchange"
        assert all(1 <= len(batch) <= 3 for step in steps for batch in step.batches)
        counted = [
            (batch, weight / world)
            for step in steps
            for batch, weight in zip(step.batches, step.weights, strict=True)
            if weight
        ]
        assert sum(weight for _, weight in counted) == pytest.approx(1.0)
        for batch, weight in counted:
            assert weight / len(batch) == pytest.approx(1 / steps[0].items)
        seen += [i for batch, _ in counted for i in batch]
    assert sorted(seen) == order


def test_what_is_left_of_an_epoch_are_its_last_items_in_order():
    batches = [[5, 1, 4], [2, 0, 3], [6]]
    for done in range(8):
        left = distributed.skip_items(batches, done)
        assert [i for batch in left for i in batch] == [5, 1, 4, 2, 0, 3, 6][done:] and all(left)
    assert distributed.skip_items(batches, 3) == batches[1:]


def test_two_processes_equal_one_with_the_doubled_batch_over_20_steps(tmp_path):
    """Weights, losses and scores, for ragged ends, a process without a batch in the last step, and accumulation."""
    for name, found in laboratory(tmp_path, "two_equal_one").items():
        assert found["steps"] == [20, 20] and found["ranks agree"], name
        assert found["distance"] < 1e-6 and found["losses"] < 1e-6, name


def test_rank_0_alone_writes_and_interrupted_runs_resume_bit_equal(tmp_path):
    """A signal to one process stops both after the same step; another number of processes goes on where they were.

    With grad_accum_steps raised to keep the batch of a step, that is equal to rounding.
    """
    found = laboratory(tmp_path, "several")
    assert [status for status, _ in found["writers"]] == [0, 0], found["writers"]
    assert found["interrupted"] == [[[143, 143, 0, 0], f"step-{k}", True] for k in (1, 2, 3, 5)]
    distance, resumed = found["two, then one"]
    assert distance < 1e-6 and len(resumed) == 1 and resumed[0].startswith("epoch 2 of 3, step 5 of 9;")


def test_a_process_that_dies_ends_the_run_with_a_message_and_nan_is_named_from_afar(tmp_path):
    found = laboratory(tmp_path, "dying")
    (status, message), (dead, _) = found["died"]
    assert (status, dead) == (1, 9) and found["seconds"] < 30
    assert "step 5 (last checkpoint" in message and "another process of this run died" in message
    for status, message in found["poisoned"]:
        assert status == 1 and f"item-{found['second']}.jpg" in message and "(soft)" in message


@pytest.fixture
def one_store(monkeypatch):
    """torchrun's store, which it keeps over all starts of two processes."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("WORLD_SIZE", "2")
    return server


@pytest.mark.parametrize("machines, found", [("1", False), ("2", True)])
def test_a_start_of_one_machine_finds_nothing_of_the_start_before(one_store, monkeypatch, machines, found):
    """Several machines do not count their restarts alike, so that their names have to stay the same."""
    stores = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, store, **__: stores.append(store))
    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    monkeypatch.setenv("RANK", "0")
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        distributed.start("cpu")
        stores[0].set("address", "of a process that died")
    assert stores[1].check(["address"]) == found


@pytest.mark.slow
def test_processes_that_are_started_again_and_late_find_each_other(one_store, monkeypatch):
    script = "import os, sys, time; from minilora.training import distributed; time.sleep(float(sys.argv[1]))\n"
    script += "distributed.start('cpu'); distributed.barrier(); os._exit(0)"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for start in range(5):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(start))
        late = {0: 3 * (start > 0), 1: 0}  # rank 1 looks for rank 0 before that is there
        command = [sys.executable, "-c", script]
        processes = [
            subprocess.Popen([*command, str(late[rank])], cwd=ROOT, env=os.environ | {"RANK": str(rank)})
            for rank in (0, 1)
        ]
        try:
            assert [process.wait(timeout=60) for process in processes] == [0, 0], f"start {start}"
        finally:
            for process in processes:
                process.kill()


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_and_max_restarts_goes_on_from_the_checkpoint(tmp_path):
    script = Path(tmp_path, "job.py")
    script.write_text(
        "import os, sys\n"
        "from minilora.training import distributed\n"
        "from tests.support.process_lab import ToyTask, train\n"
        "distributed.start('cpu')\n"
        "def after(number):\n"
        "    if number == 5 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and distributed.rank() == 1:\n"
        "        os._exit(9)\n"
        f"train({str(tmp_path / 'run')!r}, ToyTask(after=after))\n"
        "distributed.stop()\n"
    )
    root = str(ROOT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--max-restarts", "1", str(script)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stdout and checkpoint.latest_checkpoint(tmp_path / "run") is not None


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("items", [3, 4, 7, 9, 13, 22])
def test_with_batchnorm_no_microbatch_has_one_item_and_every_item_counts_once(monkeypatch, turns, items):
    order = list(range(items))
    batches = [order[i : i + 3 * turns] for i in range(0, items, 3 * turns)]
    for world in (1, 2):
        monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
        seen: list[int] = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            for step in distributed.share_steps(distributed.joined(batches, 2), turns, least=2):
                assert all(len(part) >= 2 for part in step.batches)
                seen += [i for part, w in zip(step.batches, step.weights, strict=True) if w for i in part]
        assert sorted(seen) == order


def test_batches_that_are_too_small_join_the_one_before_and_the_first_the_next():
    assert distributed.joined([[1, 2], [3]], 2) == [[1, 2, 3]]
    assert distributed.joined([[1], [2, 3], [4], [5, 6], [7]], 2) == [[1, 2, 3, 4], [5, 6, 7]]
    assert distributed.joined([[1, 2], [3]], 1) == [[1, 2], [3]]
    assert distributed.joined([[1], [2]], 2) == [[1], [2]], "--batch-size 1 is what somebody wants"
    assert distributed.joined([], 2) == []
