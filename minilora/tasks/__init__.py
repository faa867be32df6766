"""The tasks: the only rooms of the house that know both models and data.

    task = build_task(config, device)      for train.py: model, data, loss and metric in one object
    run = load_run("runs/classify-lora-000")      for evaluate.py and for programs: run.predict(["dog.jpg"])

A task NAME is two modules of this package, imported when they are needed:
  NAME.py        build(config, device) -> Task                               training; base.py says what a Task offers
  NAME_run.py    load(path, config, base, device, weights) -> Run            using a run; run.py says what a Run offers
                 zero_shot(config, options, device) -> str                   the score of a base model

Read base.py, classify.py and classify_run.py first; choice and vqa follow the same plan, with the
text side in choice_text.py and the two towers in vqa_model.py. Then results.py, what a run leaves
behind. The rest
belongs to single flags: teacher.py (--teacher), compression.py (--prune), dryrun.py, listing.py,
clip_prompts.py (zero-shot), vqa_features.py (--cache-features).
"""

import importlib
import importlib.util
from pathlib import Path

from minilora.errors import UserError
from minilora.settings.flags import TASKS, Config

__all__ = ["TASKS", "build_task", "load_run"]


def run_module(task: str):
    """The module that uses the runs of a task."""
    return _module(f"{task}.run", task)


def _module(name: str, task: str):
    if importlib.util.find_spec(f"minilora.tasks.{task}") is None:
        raise UserError(f"--task {task} is not part of this version of minilora")
    return importlib.import_module(f"minilora.tasks.{name}")


def build_task(config: Config, device: str = "cpu", taught: bool = True):
    """Model and data for training, as `config` says: a base.Task. Fills in what was left
    open (model, lr).

    taught: False takes the classes and the tokens of --teacher, but asks it nothing.
    """
    task = _module(f"{config.task}.task", config.task).build(config, device)
    if config.teacher and taught:
        from minilora.tasks.teacher import Teacher

        task.teacher = Teacher(task, device)
    return task


def load_run(path: str | Path, device: str = "cpu", weights: str | dict | None = None):
    """A run directory as a Run: model (in eval mode), preprocess, labels, predict(...). The folder
    may have been moved.

    predict(pictures): for each picture [(label, probability), ...], most probable first; vqa also
    takes question=, choice takes question= and choices=.

    weights: where the base weights are now, if not where config.toml says. Raises UserError for a
    folder that is no run, and for base weights that are gone or have changed.
    """
    from minilora.tasks.run import open_run

    return open_run(Path(path), device, weights)
