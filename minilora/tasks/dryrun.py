"""--dry-run: what would be trained, on how much, for how long, and in how much memory. Nothing is trained."""

import torch
from torch import nn

from minilora.inject import count_parameters, lora_layers
from minilora.report.page import parameter_rows
from minilora.report.tables import text_table
from minilora.tasks import base
from minilora.training.distributed import share_steps, turns
from minilora.training.trainer import TrainOptions, to_device

STATES = {"adamw": 2, "adam": 2, "sgd": 1}  # float32 numbers that the optimizer keeps per trainable one
MIB = 2**20


def describe_plan(task: base.Task, options: TrainOptions, device: torch.device) -> list[str]:
    """The lines that --dry-run prints."""
    steps = len(task.train_batches(0, turns(options.grad_accum_steps)))
    total = min(options.epochs * steps, options.max_steps or options.epochs * steps)
    parameters = ((name, p.numel(), p.requires_grad) for name, p in task.model.named_parameters())
    rows = [[name, n, f"{trained:,}", f"{size:,}"] for name, n, trained, size in parameter_rows(parameters)]
    lines = [*task.data_lines(), text_table(["module", "layers", "trainable", "all"], rows)]
    lines += [str(count_parameters(task.model)), *target_lines(task.model)]
    lines.append(
        f"steps: {steps} per epoch, {total} in all; lr {options.lr:g} {options.sched}, {options.amp}"
    )
    parts = memory_estimate(task, options, device)
    told = ", ".join(f"{name} {size / MIB:.0f}" for name, size in parts.items())
    lines.append(f"memory: about {sum(parts.values()) / MIB:.0f} MiB ({told}), besides torch itself")
    return lines


def target_lines(model: nn.Module) -> list[str]:
    """LoRA targets with their shapes, equal ones together."""
    counts: dict[str, int] = {}
    for name, layer in lora_layers(model):
        n_out, n_in = layer.lora_B.out_features, layer.lora_A.in_features
        key = f"{name.rpartition('.')[2]} ({n_in} -> {n_out}, r {layer.lora_A.out_features}, scale {layer.scaling:g})"
        counts[key] = counts.get(key, 0) + 1
    return [f"LoRA: {n} x {key}" for key, n in counts.items()]


def memory_estimate(task: base.Task, options: TrainOptions, device: torch.device) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer memory, and of what one batch leaves for the backward pass.

    The last is counted, not guessed: a forward pass with the first two items, every saved tensor once, times the rest.
    """
    parameters = list(task.model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    accumulate = options.grad_accum_steps
    first = share_steps(task.train_batches(0, turns(accumulate))[:1], accumulate)[0].batches[0]
    few = first[: min(2, len(first))]
    batch = next(iter(task.train_loader(0, [few])))
    saved = saved_bytes(task, to_device(batch, device), options.amp, device)
    return {
        "weights": weights,
        "gradients": trained,
        "optimizer": STATES[options.opt] * trained,
        "activations": saved * len(first) // len(few),
    }


def saved_bytes(task: base.Task, batch: dict, amp: str, device: torch.device) -> int:
    """Bytes that autograd keeps for the backward pass of this batch, weights not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*task.model.parameters(), *task.model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    task.model.to(device).train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), base.autocast(device, amp):
        task.loss(task.model, batch)
    return sum(kept.values())
