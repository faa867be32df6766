"""evaluate.py RUN --prune S --prune-scope P: a model made smaller, all sizes; and --latency.

Scopes of single weights (conv, backbone, all) leave a model that only a compressed file shows to be
smaller; the scope units removes whole MLP units and leaves a model that is smaller and faster. With
--prune-epochs the model learns on: all of it, masks kept and sparsity growing from .50, or with
units through LoRA, which is merged afterwards.
"""

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minilora.compress.measure import median_seconds, model_size
from minilora.compress.prune import Pruner, scope_tensors
from minilora.compress.structured import check_units, remove_mlp_units
from minilora.errors import UserError
from minilora.inject import inject_lora, merge_lora
from minilora.lora_config import LoRAConfig
from minilora.report.page import Table
from minilora.settings.flags import DEFAULT_LR
from minilora.settings.values import option
from minilora.tasks.load import build_task
from minilora.tasks.run import Run
from minilora.training.device import autocast, to_device
from minilora.training.optim import schedule_factor

UNITS = "units"
LATENCY_BATCHES = (1, 64)
CALIBRATION = 64  # training examples that tell which units matter
COLUMNS = ("model", "parameters", "not zero", "MB", "MB zipped", "ms at 1", "ms at 64", "accuracy %")


def check_pruning(runs: Sequence[Run], options: Any, typed: Iterable[str]) -> None:
    """UserError for flags that need --prune, and for a scope that matches nothing in a run."""
    if options.prune is None:
        if flags := [name for name in ("prune_scope", "prune_epochs") if name in typed]:
            raise UserError(f"{option(flags[0])} needs --prune, the share of weights to remove")
        return
    if options.export_adapter:
        raise UserError("--export-adapter: a pruned model has its adapter merged; use --merge-to, or leave --prune out")
    for run in runs:
        if options.prune_scope == UNITS:
            check_units(run.model, options.prune)
        else:
            scope_tensors(run.model, options.prune_scope)


def pruned_run(run: Run, options: Any) -> Run:
    """A copy of the run, LoRA merged, pruned as --prune, --prune-scope and --prune-epochs say."""
    sparsity, scope, epochs = options.prune, options.prune_scope, options.prune_epochs
    model = merge_lora(copy.deepcopy(run.model))
    small = replace(run, model=model)
    if scope == UNITS:
        batch = run.batch(CALIBRATION, replace(options, data_dir=None, split="train"))
        remove_mlp_units(model, sparsity, lambda: small.logits(batch))
        if epochs:
            inject_lora(model, LoRAConfig(target_modules="all-linear", modules_to_save=model.head_modules))
            learn_on(run, model, epochs, DEFAULT_LR["lora"])
    elif epochs:
        learn_on(run, model.requires_grad_(True), epochs, DEFAULT_LR["full"], scope, sparsity)
    else:
        Pruner(model, scope, sparsity).check()
    merge_lora(model).eval().requires_grad_(False)
    return small


def learn_on(
    run: Run, model: nn.Module, epochs: int, lr: float, scope: str | None = None, sparsity: float = 0.0
) -> None:
    """Train what of `model` is trainable on the run's own data: Adam, cosine. With a scope it is
    pruned meanwhile, to the end in half of the steps: the other half can repair it."""
    # as a student of the run: its classes in its order, its tokens; but only the labels
    # are learned from
    config = replace(run.config, teacher=str(run.path), adapter=None, cache_features=False, distill_unlabelled=None)
    config.tokenizer = str(run.path) if getattr(run, "tokenizer", None) else None
    task = build_task(config, run.device, taught=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    steps = epochs * len(task.train_batches(0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_factor("cosine", step, steps, 0))
    pruner = Pruner(model, scope, sparsity, steps=steps // 2) if scope else None
    if pruner:
        pruner.attach(optimizer)
    model.train()
    for epoch in range(epochs):
        for number, batch in enumerate(task.train_loader(epoch, task.train_batches(epoch))):
            torch.manual_seed(run.config.seed + epoch * steps + number)  # for dropout
            with autocast(run.device, task.amp):
                loss, _ = task.loss(model, to_device(batch, run.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    if pruner:
        pruner.finish()


def compression_rows(runs: Sequence[Run], names: Sequence[str], options: Any, rounds: int = 9) -> list[dict]:
    """A row for each run: counts, bytes, accuracy, median seconds of a forward pass at batch 1 and
    64. The models take turns while they are timed."""
    plain = [replace(run, model=merge_lora(copy.deepcopy(run.model)).eval()) for run in runs]
    turns = itertools.product(range(len(plain)), LATENCY_BATCHES)
    calls = {(i, size): partial(forward, plain[i], plain[i].batch(size, options)) for i, size in turns}
    seconds = median_seconds(calls, rounds, str(plain[0].device))
    return [
        {
            "model": name,
            **model_size(run.model)._asdict(),
            "seconds": {size: seconds[i, size] for size in LATENCY_BATCHES},
            "accuracy": (run.evaluate(options).scores or {}).get("accuracy"),
        }
        for i, (name, run) in enumerate(zip(names, plain, strict=True))
    ]


def latency(run: Run, options: Any, sizes: Sequence[int] = (1, 32), rounds: int = 15) -> list[tuple[int, float]]:
    """(batch size, median seconds of one forward pass)."""
    calls = {size: partial(forward, run, run.batch(size, options)) for size in sizes}
    return list(median_seconds(calls, rounds, str(run.device)).items())


@torch.inference_mode()
def forward(run: Run, batch: dict[str, Tensor]) -> Tensor:
    """One forward pass, to be timed."""
    with autocast(run.device, run.amp):
        return run.logits(batch)


def compression_cells(rows: Sequence[dict]) -> list[list[str]]:
    """The cells below COLUMNS."""
    return [
        [
            row["model"],
            f"{row['parameters']:,}",
            f"{row['nonzero']:,}",
            f"{row['stored'] / 1e6:.3f}",
            f"{row['zipped'] / 1e6:.3f}",
            *(f"{1000 * row['seconds'][size]:.2f}" for size in LATENCY_BATCHES),
            "" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}",
        ]
        for row in rows
    ]


def compression_report(runs: Sequence[Run], options: Any) -> tuple[Table, list[Run]]:
    """(the table of all runs, each as it is and pruned; the pruned runs)."""
    pruned = [pruned_run(run, options) for run in runs]
    what = f"{options.prune:g} of {options.prune_scope} pruned"
    names = [run.name for run in runs] + [f"{run.name}, {what}" for run in runs]
    rows = compression_rows([*runs, *pruned], names, options)
    threads = torch.get_num_threads()
    note = f"MB: 1e6 bytes of model.safetensors; ms: median of 9 forward passes on {runs[0].device}, {threads} threads"
    return Table("Compression", COLUMNS, compression_cells(rows), note), pruned
