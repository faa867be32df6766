"""Processes that make batches: no shared memory, no hang, whatever becomes of them."""

import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import pytest
import torch

from minilora.data import workers
from minilora.data.pictures.images import BadImage
from minilora.data.workers import in_workers
from minilora.errors import LostWorker
from tests.programs.test_reliability import mounts_allowed
from tests.support.cli_data import ROOT


class Maker:
    """A batch of numbers: one large tensor, one small, one empty, a list. `does(number)` is called before."""

    def __init__(self, does=lambda number: None, size=300_000):
        self.does, self.size = does, size

    def __call__(self, number):
        self.does(number)
        large = torch.full((2, self.size // 2), float(number))
        return {"x": large, "n": torch.tensor([number]), "none": torch.zeros(0, 3), "names": [f"{number}.jpg"]}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype if isinstance(a[k], torch.Tensor) else a[k] == b[k]
        for k in a
    )


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_batches_are_those_of_one_process_in_order(count):
    make = Maker()
    for number, batch in enumerate(in_workers(make, range(6), count)):
        assert same(batch, make(number))
        batch["x"].add_(1)  # the memory is ours
    assert number == 5 and list(in_workers(make, [], count)) == []


def test_every_dtype_and_shape_arrives(monkeypatch):
    monkeypatch.setattr(workers, "LARGE", 8)
    kinds = (torch.uint8, torch.bool, torch.int64, torch.float16, torch.float32, torch.float64)
    made = {str(kind): torch.arange(60).reshape(3, 4, 5).to(kind).transpose(0, 2) for kind in kinds}
    (batch,) = in_workers(lambda _: made, [0], 1)
    assert same(batch, made)


@pytest.mark.parametrize("missing", ["memfd_create", "no descriptors"])
def test_where_the_system_has_no_such_files_batches_go_through_the_pipe(monkeypatch, missing):
    def refuse(name):
        raise OSError(24, "Too many open files")

    if missing == "memfd_create":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(os, "memfd_create", refuse)
    make = Maker()
    assert all(same(batch, make(n)) for n, batch in enumerate(in_workers(make, range(5), 2)))


def test_where_no_process_can_be_started_it_is_a_sentence_and_the_others_end(monkeypatch):
    start, started = workers.Process.start, []

    def second_fails(process):
        if started:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(process)
        start(process)

    monkeypatch.setattr(workers.Process, "start", second_fails)
    with pytest.raises(LostWorker, match="can be started: Resource temporarily unavailable; try --workers 0"):
        next(in_workers(Maker(), range(4), 3))
    assert started[0].exitcode == -signal.SIGKILL


@pytest.mark.parametrize("error", [BadImage("a.jpg", "is broken"), KeyError("b"), MemoryError("no room")])
def test_an_error_in_a_worker_arrives_as_it_was(error):
    def does(number):
        if number == 3:
            raise error

    seen = []
    with pytest.raises(type(error)) as caught:
        seen += (int(batch["n"]) for batch in in_workers(Maker(does), range(9), 2))
    assert str(caught.value) == str(error)
    loader = in_workers(Maker(does), range(9), 2)
    assert [int(next(loader)["n"]) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"\(signal 9, as when memory runs out\); try fewer --workers"),
        (lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGBUS)), r"\(signal 7\); try fewer"),
        (lambda: os._exit(3), r"was ended \(exit code 3\)"),
    ],
)
def test_a_worker_that_dies_is_a_sentence_and_nobody_waits(how, said):
    loader = in_workers(Maker(lambda number: how() if number == 4 else None), range(50), 2)
    started, seen = time.monotonic(), []
    with pytest.raises(LostWorker, match=said) as caught:
        for batch in loader:
            seen.append(int(batch["n"]))
    assert seen == [0, 1, 2, 3] and time.monotonic() - started < 5 and "\n" not in str(caught.value)


def test_one_that_dies_in_the_middle_of_a_message_is_noticed(monkeypatch):
    """A batch of 40 MB through the pipe of one, half of which is sent."""
    monkeypatch.delattr(os, "memfd_create")
    send = Connection._send

    def half(self, data, **more):
        if len(data) > 1 << 20:
            send(self, data[: 1 << 20])
            os.kill(os.getpid(), signal.SIGKILL)
        send(self, data, **more)

    monkeypatch.setattr(Connection, "_send", half)
    with pytest.raises(LostWorker, match="signal 9"):
        list(in_workers(Maker(size=10_000_000), range(3), 2))


def test_a_loop_that_is_left_leaves_no_process(monkeypatch):
    """Also workers in the middle of a batch that takes minutes, which answer to no SIGTERM."""
    crews, hire = [], workers._hire

    def keep(make, batches):
        crews.append(hire(make, batches))
        return crews[-1]

    monkeypatch.setattr(workers, "_hire", keep)
    loader = in_workers(Maker(lambda number: time.sleep(120 if number > 1 else 0)), range(9), 3)
    next(loader)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 2
    assert len(crews) == 3 and all(process.exitcode == -signal.SIGKILL for process, _ in crews)


def test_workers_end_with_the_program_that_forgets_them_and_with_one_that_is_killed(tmp_path):
    """Python would wait for them at its end, and they ignore SIGTERM."""
    code = (
        "import os, sys, time\nfrom minilora.data.workers import in_workers\n"
        "def make(n):\n    open(f'{sys.argv[1]}/{os.getpid()}', 'w').close()\n    return {'n': n}\n"
        "loader = in_workers(make, range(99), 3)\nfirst = [next(loader) for _ in range(3)]\n"
        "os.kill(os.getpid(), 9) if sys.argv[2] == 'killed' else sys.exit(5)\n"
    )
    for how, status in (("forgets", 5), ("killed", -9)):
        (tmp_path / how).mkdir()
        words = [sys.executable, "-c", code, tmp_path / how, how]
        done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stderr
        ids = [int(path.name) for path in (tmp_path / how).iterdir()]
        until = time.monotonic() + 5
        while any(os.path.exists(f"/proc/{i}") and "Z" not in state_of(i) for i in ids) and time.monotonic() < until:
            time.sleep(0.05)
        assert len(ids) == 3 and all(not os.path.exists(f"/proc/{i}") or "Z" in state_of(i) for i in ids)


def state_of(process: int) -> str:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_workers_are_at_most_two_batches_ahead_each(tmp_path):
    def does(number):
        (tmp_path / str(number)).touch()

    loader = in_workers(Maker(does), range(40), 2)
    next(loader)
    time.sleep(0.3)
    assert len(list(tmp_path.iterdir())) <= 1 + 2 * (workers.AHEAD + 1)


def test_what_a_worker_needs_can_be_sent_to_one_that_is_not_forked():
    from functools import partial

    from minilora.data.pictures.loader import collate, made
    from tests.data.test_loader import shapes

    make = pickle.loads(pickle.dumps(partial(made, shapes(), collate)))
    assert make([0, 1])["image"].shape == (2, 3, 24, 24)


SMALL_SHM = """
import os, sys
from minilora.settings.flags import Config
from minilora.tasks.classify.task import build
from minilora.tasks.task import choose_workers
import torch
assert os.statvfs('/dev/shm').f_blocks * os.statvfs('/dev/shm').f_frsize <= 64 << 20
os.sched_getaffinity = lambda _: range(17)
count = choose_workers(Config(), torch.device('cuda')) if sys.argv[1] == 'default' else int(sys.argv[1])
from minilora.data.workers import in_workers
def make(n):
    return {'image': torch.full((64, 3, 224, 224), float(n)), 'label': torch.full((64,), n)}
seen = [int(b['label'][0]) for b in in_workers(make, range(3 * count), count) if b['image'].mean() == b['label'][0]]
assert seen == list(range(3 * count)), seen
print(count, 'workers')
"""


@pytest.mark.parametrize("count", ["2", pytest.param("default", marks=pytest.mark.slow)])
def test_a_container_s_shared_memory_of_64_mb_is_enough(count):
    """A batch of 64 pictures of 224 pixels is 38 MB; 2 workers, and the 16 that a run beside a GPU has by default."""
    if not mounts_allowed():
        pytest.skip("a tmpfs cannot be mounted here (needs root)")
    mount = 'mount -t tmpfs -o size=64m none /dev/shm && exec "$0" -c "$1" "$2"'
    words = ["unshare", "-m", "sh", "-c", mount, sys.executable, SMALL_SHM, count]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ("16 workers\n" if count == "default" else "2 workers\n")
