"""What a run tells people while it goes: greppable lines, train.log, a bar, metrics.jsonl."""

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from minilora.atomic import atomic_write
from minilora.errors import RunError
from minilora.textfiles import printable
from minilora.ticker import clock, terminal_bar
from minilora.training.board import Board
from minilora.training.distributed import is_main
from minilora.training.state import TrainState


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory held so far in MiB: torch's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # ru_maxrss is in bytes on macOS, in KiB elsewhere
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def finite_or_none(value: object) -> object:
    """JSON knows no NaN: such a number becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def not_through_a_link(path: str, flags: int) -> int:
    """For open(): a file that is a symbolic link is refused, so that a run writes in its own
    directory alone; a pipe that nobody reads too, for which it would wait."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def resumed_line(run: Any) -> str:
    """Where a Trainer's run continues and how its learning rate goes on, or that it has ended."""
    now, o = run.state, run.options
    if not run.unfinished():
        why = "by --early-stop" if now.epoch < o.epochs and now.step < run.last_step else "as planned"
        more = "--resume RUN with a larger --epochs (and --max-steps, if there is one) trains it longer"
        end = f"this run has ended {why}, after epoch {now.epoch} of {o.epochs}, step {now.step}"
        return f"resumed from {run.saved}: {end}; {more}"
    rate = run.lr_factor() * run.optimizer.param_groups[0]["base_lr"]
    line = f"resumed from {run.saved}: epoch {now.epoch + 1} of {o.epochs}, step {now.step} of {run.total_steps}"
    return f"{line}; {o.sched} schedule, the next learning rate is {rate:.3g}"


class Progress:
    """Lines for rank 0 (the others stay silent): to the screen, and to train.log of the run.

    On a terminal with tqdm installed the steps move a bar instead of printing lines. No colour is
    ever used, so NO_COLOR has nothing to switch off.
    """

    def __init__(
        self, run_dir: Path, device: torch.device, log_interval: int, log_to: str = "none", unit: str = "items"
    ) -> None:
        self.run_dir, self.device, self.log_interval, self.log_to = run_dir, device, log_interval, log_to
        self.bar, self.board, self.unit = None, None, unit
        self.counted = (0.0, 0.0)  # loss and items of the epoch before this step
        self.title, self.started, self.before, self.steps = "", time.perf_counter(), 0.0, 0

    def log(self, line: str) -> None:
        """One line to the screen and to train.log."""
        if is_main():
            line = printable(line)
            self._to_file(line)
            print(line, flush=True) if self.bar is None else self.bar.write(line)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.end_epoch()
        if self.board is not None:
            self.board.close()

    def start_epoch(self, state: TrainState, epochs: int, steps: int) -> None:
        """Starts the epoch's clock, and the bar where there is one."""
        self.title, self.steps = f"epoch {state.epoch + 1}/{epochs}", 0
        self.started, self.before = time.perf_counter(), state.seconds
        self.bar = terminal_bar(self.title, steps) if is_main() else None
        self.counted = (state.sums[0], state.sums[3])
        if self.log_to == "tensorboard" and is_main() and self.board is None:
            self.board = Board(self.run_dir, state.step + 1)

    def step(self, state: TrainState, total_steps: int) -> None:
        """After an optimizer step: takes the time; every log_interval-th one is logged."""
        self.steps += 1
        elapsed = time.perf_counter() - self.started
        state.seconds = self.before + elapsed
        loss, correct, counted, items = state.sums
        if self.board is not None and items > self.counted[1]:
            own = (loss - self.counted[0]) / (items - self.counted[1])
            self.board.scalars("step", {"loss": own, "lr": state.lr}, state.step)
            self.counted = (loss, items)
        line = f"step {state.step}/{total_steps} loss {loss / max(items, 1):.4f}"
        line += f" accuracy {100 * correct / max(counted, 1):.2f} % lr {state.lr:.2e}"
        if self.bar is not None:
            self.bar.set_postfix_str(line, refresh=False)
            self.bar.update()
        if is_main() and self.log_interval > 0 and self.steps % self.log_interval == 0:
            left = clock(elapsed / self.steps * (total_steps - state.step))
            line = f"{self.title} {line} {self.unit}/s {items / state.seconds:.1f} left {left}"
            line += f" peak {peak_memory_mb(self.device):.0f} MiB"
            self._to_file(line) if self.bar is not None else self.log(line)

    def end_epoch(self) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def epoch_row(self, state: TrainState, scores: dict) -> dict:
        """The epoch's row of metrics.jsonl, logged; seconds and images/s leave validation out."""
        loss, correct, counted, items = state.sums
        row = {"epoch": state.epoch + 1, "step": state.step, "lr": state.lr}
        row |= {"train_loss": loss / items if items else None}
        row |= {"train_accuracy": correct / counted if counted else None}
        row |= {"val_loss" if name == "loss" else name: value for name, value in scores.items()}
        row |= {"seconds": state.seconds, "images_per_second": items / max(state.seconds, 1e-9)}
        row |= {"peak_memory_mb": peak_memory_mb(self.device)}
        row |= {"fp16_overflows": state.overflows, "skipped_steps": state.skipped}
        first = state.history[0] if state.history else row  # later rows have the same columns
        row = {name: finite_or_none(value) for name, value in row.items() if name in first}
        words = [f"step {state.step}"]
        words += [f"{name} {row[name]:.4f}" for name in ("train_loss", "val_loss") if row[name] is not None]
        shares = [name for name in ("accuracy", "balanced", "map") if row.get(name) is not None]
        words += [f"{name} {100 * row[name]:.2f} %" for name in shares]
        words += [f"seconds {state.seconds:.1f} {self.unit}/s {row['images_per_second']:.1f}"]
        words += [f"peak {row['peak_memory_mb']:.0f} MiB"]
        words += [f"{name} {row[name]}" for name in ("fp16_overflows", "skipped_steps") if row[name]]
        self.log(f"{self.title} done: {' '.join(words)}")
        if self.board is not None:
            self.board.scalars("epoch", {k: v for k, v in row.items() if k not in ("epoch", "step")}, state.step)
        return row

    def write_metrics(self, history: list[dict]) -> None:
        """metrics.jsonl, whole: what a resumed run no longer knows is thereby cut off."""
        if is_main():
            lines = "".join(json.dumps(row) + "\n" for row in history)
            atomic_write(self.run_dir / "metrics.jsonl", lines.encode())

    def _to_file(self, line: str) -> None:
        path = self.run_dir / "train.log"
        try:
            with open(path, "a", encoding="utf-8", errors="backslashreplace", opener=not_through_a_link) as file:
                file.write(line + "\n")
        except OSError as error:
            if path.is_symlink():
                raise RunError(f"{path} is a link, which is not followed; remove it and start again") from None
            raise RunError(f"{path} cannot be written: {error.strerror}; make room and start the run again") from None
