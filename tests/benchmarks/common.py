"""What all benchmarks share: interleaved timing, medians of ratios, and a header that says on what they ran.

The rounds of all candidates alternate, so a slow minute of the machine hits everybody; a ratio is taken
inside each round and the median over rounds is quoted with its quartiles.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--rounds", type=int, default=15, help="timed rounds, after 3 of warm-up")
    flags.add_argument("--threads", type=int, default=2, help="CPU threads")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--save", action="store_true", help="write JSON and Markdown into tests/benchmarks/results")
    return flags


def prepare(arguments) -> str:
    """Set the threads and return the line that says what was measured with what."""
    torch.set_num_threads(arguments.threads)
    packages = []
    for name in ("torch", "torchvision", "transformers", "peft", "timm"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"{cpu_name()}, CPU"
    return f"{where}, {arguments.threads} threads; python {platform.python_version()}, {', '.join(packages)}"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleaved(
    candidates: dict[str, Callable], rounds: int, device: str = "cpu", warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; the order turns by one in every round.

    With one thread they are that thread's own time, which other work on the machine hardly changes.
    """
    names, seconds = list(candidates), {name: [] for name in candidates}
    clock = time.perf_counter if device.startswith("cuda") or torch.get_num_threads() > 1 else time.thread_time
    for index in range(-warmup, rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            synchronize(device)
            start = clock()
            candidates[name]()
            synchronize(device)
            if index >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile) of slow / fast, round by round."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return middle, low, high


def told(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"


def markdown(rows: list[dict]) -> str:
    """Rows with the same keys as a Markdown table."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    return "\n".join(lines + ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows])


def report(name: str, header: str, rows: list[dict], save: bool, raw: dict | None = None) -> None:
    """Print the table, and with --save keep it."""
    text = f"{header}\n\n{markdown(rows)}\n"
    print(text)
    if save:
        RESULTS.mkdir(exist_ok=True)
        load = os.getloadavg()[0]
        data = {"header": header, "load_average": load, "rows": rows, "seconds": raw or {}}
        (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(text)
