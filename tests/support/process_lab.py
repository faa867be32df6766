"""Runs that get killed, starved and multiplied, for test_faults.py and test_distributed.py.

    python -m tests.support.process_lab FOLDER SCENARIO [key=value ...]

A process that has imported torch but computed nothing forks a child per run, so that a run costs milliseconds. The
last line printed is the scenario's findings as JSON.
"""

import ctypes
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  the optimizers import it: once here, not once in every child

from minilora.atomic import file_sha256
from minilora.errors import RunError, UserError
from minilora.training import checkpoint, distributed
from minilora.training.trainer import Trainer, TrainOptions
from tests.support.toy_task import ToyTask

OPTIONS = {"epochs": 2, "save_every": 2, "log_interval": 1, "amp": "fp16", "sched": "plateau", "grad_accum_steps": 1}
PLAIN = {"dropout": 0.0, "noise": 0.0, "norm": False}


def train(folder, task=None, **options):
    """One run; every bit that matters as JSON."""
    task = task if isinstance(task, ToyTask) else ToyTask(**(task or {}))
    trainer = Trainer(task, TrainOptions(**{**OPTIONS, **options}), folder, "cpu")
    result = trainer.fit()
    clocks = ("seconds", "images_per_second", "peak_memory_mb")
    history = [{k: v for k, v in row.items() if k not in clocks} for row in result["history"]]
    return {"weights": result["weights_sha256"], "history": history, "steps": result["steps"]}


def fork(function, *args, quiet=True, **kwargs):
    """Starts function in a child, which exits as a command-line program does: 1 RunError, 2 UserError, 3 surprise."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    code, answer = 0, None
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no child outlives the laboratory
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        answer = function(*args, **kwargs)
    except SystemExit as error:
        code, answer = error.code, "SystemExit"
    except (RunError, UserError) as error:
        code, answer = (1 if isinstance(error, RunError) else 2), str(error)
    except BaseException:
        code, answer = 3, traceback.format_exc()
    os.write(writer, json.dumps(answer).encode())
    os._exit(code)


def join(child):
    """(exit code, answer) of a forked child; the code is minus the signal that killed it."""
    pid, reader = child
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, json.loads(data) if data else None


def world(size, function, *args, wait=True, **kwargs):
    """`size` processes of one gloo group, as torchrun starts them; each also gets its rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def member(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        distributed.start("cpu")
        return function(*args, **kwargs)

    children = [fork(member, rank) for rank in range(size)]
    return [join(child) for child in children] if wait else children


def digest_of(folder):
    """All files of a run whose bits may not depend on how often it was interrupted."""
    folder = Path(folder)
    tensors, values = checkpoint.load_checkpoint(checkpoint.latest_checkpoint(folder))
    del values["history"], values["best"], values["seconds"]
    parts = [(folder / "model.safetensors").read_bytes(), json.dumps(values, sort_keys=True).encode()]
    parts += [file_sha256(checkpoint.latest_checkpoint(folder) / "state.safetensors").encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


# ---- killed at a file operation, in the middle of a write, at a random moment -------------------------------


def count_file_operations(folder, at):
    """From now on every open, rename, mkdir, remove and fsync in `folder` counts; number `at` is our last."""
    seen = [0]
    names = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate")

    def count():
        if seen[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1

    def hook(event, args):
        if event in names and str(args[0]).startswith(str(folder)):
            count()

    fsync = os.fsync
    os.fsync = lambda descriptor: (count(), fsync(descriptor))[1]
    sys.addaudithook(hook)
    return seen


def operations_of_a_run(folder):
    seen = count_file_operations(folder, -1)
    train(folder)
    return seen[0]


def killed_at_operation(folder, at):
    count_file_operations(folder, at)
    train(folder)


def killed_in_a_write(folder, size):
    """The kernel kills us in the middle of the write that takes a file beyond `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    train(folder)


def check_and_finish(folder, whole, kind):
    """After a kill: what is the newest checkpoint worth, and where does the run end that goes on from it?"""
    complaints = []
    found = checkpoint.checkpoint_dirs(folder)
    if found:
        reason = checkpoint.why_invalid(found[0])
        if reason:
            complaints.append(f"newest checkpoint: {reason}")
    status, answer = join(fork(train, folder))
    if status != 0:
        complaints.append(f"resumed run: {status} {answer}")
    elif digest_of(folder) != whole:
        complaints.append("other bits")
    left = [str(p) for p in Path(folder).rglob("*") if p.name.endswith(".tmp") or ".tmp-" in p.name]
    if left:
        complaints.append(f"left behind: {left}")
    return [f"{kind}: {text}" for text in complaints]


def kills(folder, every=1, randoms=0, sizes=0):
    """SIGKILL at every `every`-th file operation, at `sizes` lengths of a file, at `randoms` moments."""
    count = join(fork(operations_of_a_run, folder / "count"))[1]
    started = time.perf_counter()
    assert join(fork(train, folder / "whole"))[0] == 0
    duration = time.perf_counter() - started
    whole, complaints, killed, tried = digest_of(folder / "whole"), [], 0, 0
    cases = [("operation", k) for k in range(0, count, every)]
    cases += [("write", 64 + 97 * k) for k in range(sizes)]
    cases += [("moment", random.Random(k).uniform(0.0, duration)) for k in range(randoms)]
    for kind, value in cases:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        if kind == "moment":
            child = fork(train, run)
            time.sleep(value)
            os.kill(child[0], signal.SIGKILL)
        else:
            child = fork(killed_at_operation if kind == "operation" else killed_in_a_write, run, value)
        status = join(child)[0]
        tried += 1
        killed += status in (-signal.SIGKILL, -signal.SIGXFSZ)
        complaints += check_and_finish(run, whole, f"{kind} {value}")
    return {"operations": count, "tried": tried, "killed": killed, "complaints": complaints}


# ---- no space, signals ---------------------------------------------------------------------------------------


def disk_full(folder):
    """Files may not grow beyond `size` bytes: the write fails with EFBIG, as it does with ENOSPC on a full disk."""

    def starve(run, size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return train(run)

    def snapshot(run):
        return {str(p.relative_to(run)): file_sha256(p) for p in sorted(run.rglob("*")) if p.is_file()}

    assert join(fork(train, folder / "whole"))[0] == 0
    run, findings = folder / "run", {"statuses": [], "messages": [], "complaints": []}
    join(fork(interrupted_at, run, 4, signal.SIGTERM))
    for size in (0, 100, 1000, 2000, 4000):
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        (copy / "train.log").unlink()
        before = snapshot(copy)
        status, message = join(fork(starve, copy, size))
        findings["statuses"].append(status)
        findings["messages"].append(message)
        after = snapshot(copy)
        changed = [n for n in before if before[n] != after.get(n)]
        torn = [n for n in after if ".tmp" in n]
        if changed or torn:
            findings["complaints"].append(f"size {size}: changed {changed} torn {torn}")
        findings["complaints"] += check_and_finish(copy, digest_of(folder / "whole"), f"size {size}")
    return findings


def interrupted_at(folder, step, signum, workers=0, seconds=0.0, to_group=False, only_rank=None, **options):
    """A run that sends itself `signum` during optimizer step `step`."""

    def after(number):
        if number == step and only_rank in (None, distributed.rank()):
            os.killpg(0, signum) if to_group else os.kill(os.getpid(), signum)
            time.sleep(seconds)

    if to_group:
        os.setsid()
    return train(folder, ToyTask(after=after, workers=workers), **options)


def signals(folder):
    assert join(fork(train, folder / "whole"))[0] == 0
    whole, findings = digest_of(folder / "whole"), {"complaints": []}
    for name, signum, extra in (
        ("SIGTERM", signal.SIGTERM, {}),
        ("SIGINT", signal.SIGINT, {}),
        ("SIGTERM to workers too", signal.SIGTERM, {"workers": 2, "to_group": True}),
        ("SIGINT to workers too", signal.SIGINT, {"workers": 2, "to_group": True}),
    ):
        run = folder / name
        status, answer = join(fork(interrupted_at, run, 3, signum, **extra))
        newest = checkpoint.latest_checkpoint(run)
        findings[name] = [status, newest and newest.name]
        findings["complaints"] += [] if status > 2 else [f"{name}: {answer}"]
        findings["complaints"] += check_and_finish(run, whole, name)
    run = folder / "twice"
    child = fork(interrupted_at, run, 3, signal.SIGTERM, seconds=30.0)
    while not (run / "train.log").is_file() or "step 2/" not in (run / "train.log").read_text():
        time.sleep(0.01)
    time.sleep(0.3)
    started = time.perf_counter()
    os.kill(child[0], signal.SIGTERM)
    findings["twice"] = [join(child)[0], time.perf_counter() - started < 5.0]
    findings["complaints"] += check_and_finish(run, whole, "twice")
    return findings


# ---- several processes -----------------------------------------------------------------------------------------


def tensors_of(folder):
    return checkpoint.load_checkpoint(checkpoint.latest_checkpoint(folder))[0]


def distance(a, b):
    """Largest difference of two runs' last weights."""
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    return max((a[n].double() - b[n].double()).abs().max().item() for n in a if n.startswith("model."))


def only_rank_0_writes(folder, **options):
    def hook(event, args):
        writes = event == "open" and isinstance(args[1], str) and any(c in args[1] for c in "wa+x")
        if distributed.rank() and (writes or event in ("os.rename", "os.mkdir")) and str(folder) in str(args[0]):
            if not Path(args[0]).is_dir():
                raise AssertionError(f"rank {distributed.rank()} writes: {event} {args}")

    folder.mkdir(parents=True, exist_ok=True)
    sys.addaudithook(hook)
    return train(folder, PLAIN | {"batch_size": 2}, **options)


def two_equal_one(folder):
    """20 optimizer steps of 2 processes with batch b against 1 process with batch 2b, ragged ends included."""
    findings = {}
    cases = (("even", 32, 2, 1), ("ragged", 22, 3, 1), ("one process has none", 18, 2, 1), ("accumulation", 23, 2, 2))
    for name, n, batch, accumulate in cases:
        options = {"amp": "fp32", "sched": "cosine", "lr": 0.01, "epochs": 9, "max_steps": 20, "save_every": 0}
        options["grad_accum_steps"] = accumulate
        data = PLAIN | {"n": n}
        status, single = join(fork(train, folder / f"{name}-1", data | {"batch_size": 2 * batch}, **options))
        assert status == 0, single
        two = world(2, train, folder / f"{name}-2", data | {"batch_size": batch}, **options)
        assert [status for status, _ in two] == [0, 0], two
        findings[name] = {
            "distance": distance(folder / f"{name}-1", folder / f"{name}-2"),
            "steps": [single["steps"], two[0][1]["steps"]],
            "ranks agree": two[0][1] == two[1][1],
            "losses": max(
                abs(a[key] - b[key])
                for a, b in zip(single["history"], two[0][1]["history"], strict=True)
                for key in ("train_loss", "val_loss", "accuracy", "train_accuracy")
            ),
        }
    return findings


def several(folder):
    """Two processes: who writes; one of them is interrupted at various steps; another number of them goes on."""
    findings = {"writers": world(2, only_rank_0_writes, folder / "writers")}
    assert world(2, train, folder / "whole")[0][0] == 0
    whole, findings["interrupted"] = digest_of(folder / "whole"), []
    for step in (1, 2, 3, 5):
        run = folder / f"stopped-{step}"
        stopped = world(2, interrupted_at, run, step, signal.SIGTERM, only_rank=1)
        newest = checkpoint.latest_checkpoint(run)
        finished = world(2, train, run)
        same = digest_of(run) == whole
        statuses = [status for status, _ in stopped + finished]
        findings["interrupted"].append([statuses, newest and newest.name, same])
    options = {"amp": "fp32", "epochs": 3, "sched": "cosine", "lr": 0.01}
    world(2, train, folder / "two", PLAIN, **options)
    world(2, interrupted_plain, folder / "two-one", **options)
    join(fork(train, folder / "two-one", PLAIN, grad_accum_steps=2, **options))
    findings["two, then one"] = [distance(folder / "two", folder / "two-one"), steps_resumed(folder / "two-one")]
    return findings


def interrupted_plain(folder, **options):
    def after(number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    return train(folder, ToyTask(after=after, **PLAIN), **options)


def steps_resumed(folder):
    return [line.split(": ")[1] for line in (folder / "train.log").read_text().splitlines() if "resumed" in line]


def dying(folder):
    def die(number):
        if number == 5 and distributed.rank() == 1:
            os._exit(9)

    def run():
        return train(folder / "dying", ToyTask(after=die))

    def poisoned():
        return train(folder / "poisoned", ToyTask(batch_size=2, poison=(second,)), amp="fp32")

    started = time.perf_counter()
    died = world(2, run)
    seconds = time.perf_counter() - started
    second = ToyTask(batch_size=2).train_batches(0)[1][0]  # in rank 1's first batch
    return {"died": died, "seconds": seconds, "poisoned": world(2, poisoned), "second": second}


def main():
    torch.set_num_threads(1)
    folder, name = Path(sys.argv[1]), sys.argv[2]
    arguments = {key: int(value) for key, value in (text.split("=") for text in sys.argv[3:])}
    print(json.dumps(globals()[name](folder, **arguments)))


if __name__ == "__main__":
    main()
