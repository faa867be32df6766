"""The two doors: a configuration becomes a task to train, a run directory becomes a Run.

A task NAME is two modules, imported when they are needed:
  NAME/task.py  build(config, device) -> Task     task.py says what a Task offers
                open_data(config) -> its data in parts
  NAME/run.py   load(path, config, recorded, device, weights) -> Run     run.py: what a Run offers
                zero_shot(config, options, device) -> str     the score of a base model
"""

import importlib
from pathlib import Path
from types import ModuleType

import torch

from minilora.errors import UserError
from minilora.settings.flags import TASKS, Config
from minilora.settings.parse import read_run_config
from minilora.tasks.run import WEIGHT_FILES, Run
from minilora.tasks.runfiles import check_weight_file, read_summary
from minilora.tasks.task import Task
from minilora.tasks.teacher import Teacher


def task_module(task: str, name: str) -> ModuleType:
    """The module NAME of a task: "task" or "run"."""
    if task not in TASKS:
        raise UserError(f"--task {task} is not part of this version of minilora")
    return importlib.import_module(f"minilora.tasks.{task}.{name}")


def build_task(config: Config, device: str | torch.device = "cpu", taught: bool = True) -> Task:
    """Model and data for training, as `config` says. Fills in what was left open (model, lr).

    taught: False takes the classes and the tokens of --teacher, but asks it nothing.
    """
    task = task_module(config.task, "task").build(config, device)
    if config.teacher and taught:
        task.teacher = Teacher(task, load_run(config.teacher, device))
    return task


def load_run(path: str | Path, device: str | torch.device = "cpu", weights: str | dict | None = None) -> Run:
    """A run directory as a Run: model (in eval mode), preprocess, labels, predict(...). The folder
    may have been moved.

    predict(pictures): for each picture [(label, probability), ...], most probable first; vqa also
    takes question=, choice takes question= and choices=.

    weights: where the base weights are now, if not where config.toml says. Raises UserError for a
    folder that is no run, and for base weights that are gone or have changed.
    """
    path = Path(path)
    if not path.is_dir():
        problem = "is a file; name its run directory" if path.exists() else "no such run directory"
        raise UserError(f"{path}: {problem}")
    config, recorded = read_run_config(path)
    file = path / WEIGHT_FILES[config.mode]
    if not file.is_file():
        raise UserError(f"{path}: {file.name} is missing; the run has not finished an epoch yet")
    check_weight_file(file, read_summary(path))
    return task_module(config.task, "run").load(path, config, recorded, torch.device(device), weights)
