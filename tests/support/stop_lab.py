"""Runs of train.py that get a signal in every phase, for test_signals.py.

    python -m tests.support.stop_lab FOLDER SIGNUM PHASE ...

Each run is a forked child of a process that has imported everything. In the phase's function it sends itself the
signal, would then sleep for a minute, and is started again. The last line printed is the findings as JSON.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from minilora import ticker
from minilora.atomic import write_json
from minilora.commands import results
from minilora.data.pictures import folder
from minilora.errors import UserError
from minilora.settings import exit_codes as cli
from minilora.tasks import labelled, lock
from minilora.tasks.classify.task import Classify
from minilora.tasks.task import Task
from minilora.training import checkpoint
from minilora.training.trainer import Trainer
from reference_models import ModelError
from tests.support.process_lab import fork, join
from tests.support.tiny_tasks import bits, train, write_tasks

# phase: (where the signal comes, in which call of it)
PHASES = {
    "listing": (folder, "list_pictures", 2),
    "encoding": (Classify, "encoded", 2),
    "first batch": (folder.Split, "load", 1),
    "step": (Trainer, "accumulate", 3),
    "first validation": (labelled.LabelledPredictor, "columns", 1),
    "last validation": (labelled.LabelledPredictor, "columns", 2),
    "test": (Task, "test", 1),
    "report": (results, "write_report", 1),
}


def program(words) -> int:
    code = cli.run(lambda _: train.main([str(word) for word in words]), (UserError, ModelError))
    return sys.exit(code)


def stopped(words, phase: str, signum: int) -> None:
    """A run that gets a signal in `phase`."""
    place, name, at = PHASES[phase]
    function, calls = getattr(place, name), []

    def called(*args, **kwargs):
        calls.append(time.monotonic())
        if len(calls) == at:
            os.kill(os.getpid(), signum)
            if phase != "step":
                time.sleep(60)
        return function(*args, **kwargs)

    setattr(place, name, called)
    if phase != "report":
        quickly()
    program(words)


def quickly() -> None:
    """Without the figures and the page, which cost more than the training."""

    def summary(task, run_dir, result, test, device):
        write_json(run_dir / "summary.json", {"weights_sha256": result["weights_sha256"]})

    train.results.write_results = summary


def whole(words) -> None:
    quickly()
    program(words)


def main(root: Path, signum: int, phases: list[str]) -> dict:
    torch.set_num_threads(1)
    ticker.EVERY = 1e9
    tasks = write_tasks(root)
    common = ["--epochs", "2", "--lr", "0.01", "--augment", "none"]
    lora = [*tasks["classify"], *common]
    cached = [*lora, "--mode", "linear", "--cache-features"]
    found = {}
    for name, words in (("lora", lora), ("cached", cached)):
        assert join(fork(whole, [*words, "--output", root / name]))[0] == 0
    for phase in phases:
        run, kind = root / phase, "cached" if phase == "encoding" else "lora"
        words = [*(cached if kind == "cached" else lora), "--output", run]
        started = time.monotonic()
        code = join(fork(stopped, words, phase, signum))[0]
        seconds = time.monotonic() - started
        newest = checkpoint.latest_checkpoint(run, lambda line: None)
        said = (run / "train.log").read_text() if (run / "train.log").is_file() else ""
        left = [path.name for path in run.rglob("*") if ".tmp" in path.name or path.name == lock.FILE]
        again = join(fork(whole, words))[0]
        equal = again == 0 and bits(run) == bits(root / kind)
        found[phase] = [code, seconds < 20, newest and newest.name, "--resume" in said, left, equal]
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
