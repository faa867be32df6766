"""train.py --seeds: the same run for each seed, one after the other, then mean and spread.

Each is a process of its own and has the bits that --seed N gives. It lies in DIR-seed-N: DIR is
--output, else the next free runs/TASK-MODE-NNN. A run that fails is named and the others continue.
"""

import copy
import shlex
from dataclasses import replace
from pathlib import Path

from minilora.commands.backbones import run_plan
from minilora.commands.results import summary_row
from minilora.report.tables import comparison_table
from minilora.settings.flags import Config
from minilora.settings.parse import given, read_run_config
from minilora.tasks.load import task_module
from minilora.tasks.rundir import ROOT
from minilora.tasks.runfiles import read_summary


def train_all(config: Config) -> int:
    """All runs and their table; 1 where one has failed. UserError for data that none can read."""
    if config.data_dir:
        task_module(config.task, "task").open_data(copy.copy(config))
    names = (f"{config.task}-{config.mode}-{n:03d}" for n in range(10_000))
    first = Path(config.output or ROOT / next(name for name in names if not list(ROOT.glob(f"{name}*"))))
    plan, rows = {}, []
    for seed in config.seeds:
        one = plan[f"{first.name}-seed-{seed}"] = copy.copy(config)
        one.seed, one.seeds, one.given = seed, None, given(config) | {"seed"}

    def finish(path: Path, _: Config) -> None:
        rows.append(summary_row(path, read_run_config(path)[0], read_summary(path)))

    failed = run_plan(plan, first.parent, finish)
    if rows:
        print(comparison_table([replace(row, group="") for row in rows] + rows * (len(rows) > 1)))
        runs = shlex.join(str(first.parent / row.name) for row in rows)
        print(f"next:\n  python evaluate.py {runs} --report report.html")
    return failed
