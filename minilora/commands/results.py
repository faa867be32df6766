"""The results of a run: the lines that say how it went, and the files that it leaves."""

import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minilora.atomic import atomic_write, write_json, write_png
from minilora.commands.card import model_card
from minilora.commands.pages import SHOWN, data_name, report_data, scored_on
from minilora.data.unlabelled import mixed_counts
from minilora.inject import count_parameters
from minilora.report.curves import curves_figure
from minilora.report.metrics import NAMES, percent, shown
from minilora.report.page import collect_versions, write_report
from minilora.report.tables import RunRow, group_key
from minilora.settings.flags import Config
from minilora.settings.flags_evaluate import EvalConfig
from minilora.tasks.load import load_run
from minilora.tasks.run import WEIGHT_FILES, Evaluation, Run
from minilora.tasks.task import Task
from minilora.tasks.weights import weights_sha256
from minilora.training.board import Board
from minilora.training.distributed import world_size
from minilora.training.progress import finite_or_none
from minilora.training.trainer import TrainOptions


def method_line(config: Config, options: TrainOptions, device: torch.device) -> str:
    """How the model will be trained, in one line."""
    plus = f" (lora_B {config.lora_plus:g} times that)" if config.lora_plus else ""
    line = f"mode {config.mode}: {config.opt} lr {config.lr:g}{plus} {config.sched}, batch {config.batch_size}"
    line += f" x {config.grad_accum_steps}" * (config.grad_accum_steps > 1)
    line += f", epochs {config.epochs}, {options.amp} on {device}"
    if device.type == "cpu":
        line += f", {torch.get_num_threads()} threads"
    if config.base_dtype not in (None, "fp32"):
        line += f", frozen weights in {config.base_dtype}"
    line += "; frozen features are computed once, in the first epoch's seconds" * config.cache_features
    if config.adapter:
        fresh = f", with a new {', '.join(config.new_heads)}" * bool(config.new_heads)
        line += f"; started from the adapter {config.adapter}{fresh}"
    if config.teacher:
        square = f", times {config.distill_temperature**2:g}"
        soft = f" at temperature {config.distill_temperature:g}" + square * config.distill_t2
        how = ", its best answer alone" if config.distill_hard else soft
        line += f"; labels {config.distill_alpha:g}, the rest from {Path(config.teacher).name}{how}"
    if config.distill_unlabelled:
        size = config.batch_size * config.grad_accum_steps * world_size()
        line += f"; {mixed_counts(size, config.unlabelled_share)[1]} of {size} rows in a step have no label, but the "
        line += f"teacher's answer alone{square * (not config.distill_hard)}; an epoch is one pass over these"
    return line


def zero_shot_line(task: Task, scores: dict[str, float]) -> str:
    """What the model knew before the first step, in one line."""
    shares = {"val": scores["accuracy"], "test": scores.get("test_accuracy")}
    chance = percent(1 / len(task.labels))
    return f"zero-shot, before the first step: {_by_part(task, shares, 'accuracy')} | baseline: chance {chance}"


def result_line(task: Task, result: dict, test: dict | None) -> str:
    """What came out, in one line."""
    best, metric = result["best"], task.metric
    shares = {"val": best["val_loss" if metric == "loss" else metric], "test": test and test[metric]}
    line = f"result: {_by_part(task, shares, metric)}, epoch {best['epoch']}"
    return f"{line}, {result['seconds']:.1f} s, peak {result['peak_memory_mb']:.0f} MiB"


def _by_part(task: Task, shares: dict[str, float | None], metric: str) -> str:
    """The metric, and each share with its part and how many rows that has."""
    counts = {part: len(task.data[part]) for part in shares if shares[part] is not None}
    words = [f"{shown(metric, shares[part], n)} ({part}, {n} {task.unit})" for part, n in counts.items()]
    return f"{NAMES.get(metric, metric)} {', '.join(words)}"


def unlearned_line(task: Task, result: dict) -> str | None:
    """A line where the training loss did not fall below that of a guess, log(K) of K classes."""
    config, loss, guess = task.config, result["final"]["train_loss"], math.log(len(task.labels))
    other = config.teacher or config.soft_targets or config.multi_label
    if other or loss is None or loss < guess:
        return None
    return (
        f"nothing was learned: the training loss ended at {loss:.4g}, and that of a guess is {guess:.4g}; try another "
        f"--lr (it was {config.lr:g}) or more --epochs"
    )


def resume_command(run_dir: Path) -> str:
    """What to type to resume a run."""
    return shlex.join(["python", "train.py", "--resume", str(run_dir)])


def next_commands(run_dir: Path, config: Config) -> list[str]:
    """The run directory, and what to type now."""
    # two towers are ours, or need a text tower as transformers has it
    layout = "minilora" if config.task == "vqa" or isinstance(config.model, dict) else "transformers"
    question = {"classify": "", "vqa": ' --question "..."', "choice": ' --question "..." --choices A B C D'}
    command = shlex.join(["python", "evaluate.py", str(run_dir)])
    return [
        f"run directory: {run_dir}",
        "next:",
        f"  {command} --report report.html",
        f"  {command} --image PICTURE{question[config.task]}",
        f"  {command} --merge-to merged --layout {layout}",
    ]


def write_results(task: Task, run_dir: Path, result: dict, test: dict | None, device: torch.device) -> None:
    """The files that a finished run leaves, made from the run directory as by evaluate.py."""
    counts = count_parameters(task.model)
    config = task.config
    summary = {
        "task": config.task,
        "mode": config.mode,
        "model": config.model,
        "metric": task.metric,
        "best": result["best"],
        "final": result["final"],
        "zero_shot": result.get("zero_shot"),
        "test": test and {key: finite_or_none(value) for key, value in test.items()},
        "parameters": {"trainable": counts.trainable, "total": counts.total},
        "rows": task.rows(),
        **{key: result[key] for key in ("steps", "seconds", "images_per_second", "peak_memory_mb")},
        "weights_sha256": result["weights_sha256"],
        "file_sha256": weights_sha256(run_dir / WEIGHT_FILES[config.mode]),
        "seed": config.seed,
        "device": str(device),
        "amp": task.amp,
        "threads": torch.get_num_threads(),
        "versions": collect_versions(),
    }
    write_json(run_dir / "summary.json", summary)
    best = {run_dir.name: result["best"]["epoch"]}
    curves_figure({run_dir.name: run_dir / "metrics.jsonl"}, run_dir / "curves.png", best)
    options = EvalConfig(workers=task.workers, attention=SHOWN)
    run = load_run(run_dir, device, config.weights if config.mode != "full" else None)
    evaluation = run.evaluate(options)
    data = report_data([run], [evaluation], options)
    for figure in data.figures:
        write_png(run_dir / "attention.png", figure.image)
    write_report(data, run_dir / "report.html")
    layouts = tuple(getattr(run.model, "layouts", ()))
    card = model_card(run_dir, config, task.base, task.labels, summary, task.data_lines(), layouts)
    atomic_write(run_dir / "README.md", card)
    if config.log_to == "tensorboard":
        board = Board(run_dir, result["steps"] + 1)
        for name in ("curves", "attention"):
            board.picture(name, run_dir / f"{name}.png", result["steps"])
        board.close()


def run_row(run: Run, evaluation: Evaluation | None = None, options: EvalConfig | None = None) -> RunRow:
    """A run's line in a comparison; scores of `evaluation`, or those of its best epoch."""
    scores = evaluation.scores if evaluation and evaluation.scores else {}
    data = scored_on(run, evaluation, options) if evaluation and options else data_name(run.config)
    return summary_row(run.path, run.config, run.summary, scores, data)


def zero_shot_row(run: Run, evaluation: Evaluation, options: EvalConfig) -> RunRow:
    """The line of a run's base model, of which nothing is trained."""
    scores = evaluation.scores or {}
    kept = {key: scores.get(key) for key in ("accuracy", "balanced", "precision", "recall", "f1")}
    total = count_parameters(run.model).total - count_parameters(run.model).trainable * (run.config.mode == "lora")
    known = {"model": run.config.model_name, "data": scored_on(run, evaluation, options)}
    return RunRow("zero-shot", "none", trainable=0, total=total, **known, **kept)


def summary_row(
    path: Path, config: Config, summary: dict[str, Any], scores: dict | None = None, data: str = ""
) -> RunRow:
    """The same line from the files of a run alone; `scores` win over those of its best epoch."""
    final = summary.get("final")
    ended = final.get("epoch", config.epochs) if isinstance(final, dict) else config.epochs
    best, counts, scores = summary.get("best") or {}, summary.get("parameters") or {}, scores or {}
    known = best | scores
    main = "map" if config.multi_label else "accuracy"
    return RunRow(
        name=path.name,
        mode=config.mode,
        group=group_key(asdict(config)),
        seed=config.seed,
        model=config.model_name,
        data=data,
        epochs=str(ended) if ended == config.epochs else f"{ended} of {config.epochs}",
        augment=config.augment,
        metric=NAMES[main],
        accuracy=known.get(main),
        test_accuracy=(summary.get("test") or {}).get(main),
        val_loss=scores.get("loss", best.get("val_loss")),
        **{name: known.get(name) for name in ("balanced", "precision", "recall", "f1", "train_accuracy", "train_loss")},
        **{name: counts.get(name) for name in ("trainable", "total")},
        **{name: summary.get(name) for name in ("seconds", "peak_memory_mb")},
        file_mb=(path / WEIGHT_FILES[config.mode]).stat().st_size / 1e6,
    )
