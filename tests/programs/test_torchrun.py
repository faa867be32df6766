"""torchrun train.py: two processes are one with the doubled batch, rank 0 alone writes, and another number goes on."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.training import checkpoint
from tests.support.cli_data import ROOT
from tests.support.tiny_tasks import train, write_tasks

# plain SGD: Adam divides a gradient by its own size and so makes much of the rounding in those that are nearly zero
STEPS = ["--amp", "fp32", "--epochs", "4", "--max-steps", "20", "--opt", "sgd", "--lr", "0.01", "--augment", "none"]
STEPS += ["--log-interval", "1000", "--device", "cpu"]


def torchrun(words, processes=2, *more, **environment) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node N train.py WORDS` on the CPU (gloo)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *more]
    return subprocess.run(
        [str(word) for word in (*launcher, "train.py", *words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def weights(run):
    """{name: tensor} of the trainable weights in the newest checkpoint."""
    tensors, _ = checkpoint.load_checkpoint(checkpoint.latest_checkpoint(run))
    return {name: tensor.double() for name, tensor in tensors.items() if name.startswith("model.")}


def distance(a, b) -> float:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without(words, *flags):
    """The words without these flags and their values."""
    words = list(map(str, words))
    for flag in flags:
        place = words.index(flag)
        del words[place : place + 2]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("task", ["shapes", "classify", "vqa", "choice"])
def test_two_processes_equal_one_with_the_doubled_batch(task, tmp_path):
    """20 steps; weights to 1e-6, every validation row once, equal scores, and files from one process alone."""
    if task == "shapes":
        words = ["--data-format", "shapes", "--subset", "160"]
    else:
        words = without(write_tasks(tmp_path)[task], "--batch-size", "--device", "--log-interval")
    words += [*STEPS, *(["--fusion", "concat"] if task == "vqa" else [])]  # product has dropout of its own
    done = torchrun([*words, "--batch-size", 4, "--output", tmp_path / "two"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trainable params:") == 1 and done.stdout.count("result:") == 1
    assert train.main([*map(str, words), "--batch-size", "8", "--output", str(tmp_path / "one")]) == 0
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-6
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one["step"] == two["step"] and one["accuracy"] == two["accuracy"]
        assert abs(one["val_loss"] - two["val_loss"]) < 2e-6 and abs(one["train_loss"] - two["train_loss"]) < 2e-6
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one(tmp_path):
    """With --grad-accum-steps doubled the steps keep their items: equal to rounding."""
    words = without(write_tasks(tmp_path)["classify"], "--batch-size", "--device", "--log-interval")
    words += [*STEPS, "--batch-size", "4"]
    assert torchrun([*words, "--output", tmp_path / "whole"]).returncode == 0
    half = [*words, "--save-every", "1", "--output", tmp_path / "run"]
    assert torchrun(half).returncode == 0
    folder = tmp_path / "run" / "checkpoints"
    newest = checkpoint.latest_checkpoint(tmp_path / "run")
    earlier = next(path for path in checkpoint.checkpoint_dirs(tmp_path / "run") if path != newest)
    earlier.rename(tmp_path / earlier.name)
    for path in folder.iterdir():
        subprocess.run(["rm", "-r", str(path)], check=True)
    (tmp_path / earlier.name).rename(folder / earlier.name)
    config = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(config.replace("grad_accum_steps = 1", "grad_accum_steps = 2"))
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"{earlier.name}: epoch" in log
    assert distance(tmp_path / "whole", tmp_path / "run") < 1e-6


def launched(words, folder, *more) -> subprocess.Popen:
    """torchrun with two processes of train.py, in `folder`, whose output can be read while it goes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [str(word) for word in (*launcher, *more, ROOT / "train.py", *words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(process, text) -> str:
    """What the launch prints up to the line that has `text` in it."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def long_run(folder):
    """Flags of a run that a signal surely meets before its end."""
    words = without(write_tasks(folder)["classify"], "--log-interval")
    return [*words, "--epochs", "400", "--max-steps", "2000", "--log-interval", "1", "--augment", "none"]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_writes_a_checkpoint_within_a_step(signum, tmp_path):
    """As a scheduler ends a job; torchrun's own exit status is not 0, and --resume goes on from that step."""
    process = launched([*long_run(tmp_path), "--output", "run"], tmp_path)
    before = until(process, " step 5/")
    process.send_signal(signum)
    after = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    said = re.search(r"stopped by signal (\d+) after step (\d+); checkpoint run/checkpoints/step-(\d+)", after)
    assert said, before[-1000:] + after
    shown = re.findall(r" step (\d+)/", before + after[: said.start()])
    assert int(said[2]) == int(said[3]) <= int(shown[-1]) + 1
    assert "go on with: python train.py --resume run" in after
    newest = checkpoint.latest_checkpoint(tmp_path / "run")
    assert newest.name == f"step-{said[2]}"


@pytest.mark.slow
def test_max_restarts_goes_on_in_the_same_directory_without_output(tmp_path):
    """One process is killed; torchrun starts both again, and they find the run of their first start."""
    words = [*long_run(tmp_path), "--save-every", "2", "--max-steps", "60"]
    process = launched(words, tmp_path, "--max-restarts", "1")
    until(process, " step 9/")
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers}
    os.kill(int(max(pid for pid, words in commands.items() if b"train.py" in words)), signal.SIGKILL)
    after = process.communicate(timeout=240)[0]
    assert process.returncode == 0, after[-3000:]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["classify-lora-000"]
    run = tmp_path / "runs/classify-lora-000"
    assert "resumed from runs/classify-lora-000/checkpoints/step-" in (run / "train.log").read_text()
    assert (run / "summary.json").exists() and checkpoint.latest_checkpoint(run).name == "step-60"


@pytest.mark.slow
def test_a_mistake_is_told_once_for_every_process_and_ends_the_run(tmp_path):
    done = torchrun(["--data-dir", tmp_path / "nowhere", "--device", "cpu"])
    assert done.returncode != 0 and "no such folder" in done.stderr and "Traceback" not in done.stdout
