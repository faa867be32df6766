"""The tasks: the only rooms of the house that know both models and data.

    task = build_task(config, device)         # for train.py: model, data, loss and metric
    run = load_run("runs/classify-lora-000")  # for evaluate.py and programs: run.predict([...])

Each task has a drawer: classify/, choice/, vqa/, with task.py (training it) and run.py (using what
was trained). Read method, task and classify/task.py first; the other tasks follow the same plan.
Beside the drawers stands what they share, in the order in which train.py and evaluate.py need it:

load         the two doors: from a configuration to a task, from a run directory to a Run
weights      base weights: found, loaded, recorded, recognised
method       flags -> LoRA in the model
task         what a task offers to the Trainer, and the part of it that all share
predictor    from a batch to answers: the same in training and in a finished run
labelled     what classification and multiple choice share: one label for each row
teacher      --teacher: the share of the loss that comes from a finished run
towers       a picture tower and a text tower of models of their own, and the tokenizer
clip         a CLIP and its tokenizer, for choice and for zero-shot classification
rundir       the directory of a run: made, found again, resumed
runfiles     the small files in it: labels, preprocessing, summary
run          a finished run, opened again

What is printed and written about a run is in minilora/commands. Importing this package imports
nothing of the house: the names are looked up when they are first used.
"""

import importlib

_HOME = {"build_task": "load", "load_run": "load"}
__all__ = [*_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'minilora.tasks' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minilora.tasks.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
