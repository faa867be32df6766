"""--dry-run, which trains nothing: what would be trained, on how much, how long, in what memory."""

from collections import Counter

import torch
from torch import nn

from minilora.inject import count_parameters, lora_layers
from minilora.report.page import parameter_rows
from minilora.report.tables import text_table
from minilora.tasks.task import Task
from minilora.textfiles import printable
from minilora.training.device import autocast, to_device
from minilora.training.distributed import share_steps, turns
from minilora.training.trainer import TrainOptions

# float32 numbers that the optimizer keeps per trainable one
STATES = {"adamw": 2, "adam": 2, "sgd": 1}
MIB = 2**20


def describe_plan(task: Task, options: TrainOptions, device: torch.device) -> list[str]:
    """The lines that --dry-run prints."""
    steps = len(task.train_batches(0, turns(options.grad_accum_steps)))
    total = min(options.epochs * steps, options.max_steps or options.epochs * steps)
    parameters = ((name, p.numel(), p.requires_grad) for name, p in task.model.named_parameters())
    rows = [[name, n, f"{trained:,}", f"{size:,}"] for name, n, trained, size in parameter_rows(parameters)]
    lines = [*map(printable, (*task.data_lines(), *task.picture_lines()))]
    lines.append(text_table(["module", "layers", "trainable", "all"], rows))
    lines += [str(count_parameters(task.model)), *target_lines(task.model)]
    lines.append(f"steps: {steps} per epoch, {total} in all; lr {options.lr:g} {options.sched}, {options.amp}")
    parts = memory_estimate(task, options, device)
    each = ", ".join(f"{name} {size / MIB:.0f}" for name, size in parts.items())
    lines.append(f"memory: about {sum(parts.values()) / MIB:.0f} MiB ({each}), besides torch itself")
    return lines


def target_lines(model: nn.Module) -> list[str]:
    """LoRA targets with their shapes, equal ones together."""
    counts = Counter(
        f"{name.rpartition('.')[2]} ({layer.in_features} -> {layer.out_features}, r {layer.r}, scale {layer.scaling:g})"
        for name, layer in lora_layers(model)
    )
    return [f"LoRA: {n} x {kind}" for kind, n in counts.items()]


def memory_estimate(task: Task, options: TrainOptions, device: torch.device) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer memory, of what one batch leaves for the backward
    pass, and in passing.

    Activations are counted, not guessed: a forward pass with the first two items, every saved
    tensor once, times the rest. In passing live the widest layer's input and output, two tensors as
    large as the largest one.
    """
    parameters = list(task.model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    accumulate = options.grad_accum_steps
    first = share_steps(task.train_batches(0, turns(accumulate))[:1], accumulate)[0].batches[0]
    few = first[: min(2, len(first))]
    batch = next(iter(task.train_loader(0, [few])))
    saved, largest = saved_bytes(task, to_device(batch, device), options.amp, device)
    activations = saved * len(first) // len(few)
    return {
        "weights": weights,
        # without accumulation gradients only take the place of the activations that backward frees
        "gradients": trained if accumulate > 1 else max(0, trained - activations),
        "optimizer": STATES[options.opt] * trained,
        "activations": activations,
        "in passing": 2 * largest * len(first) // len(few),
    }


def saved_bytes(task: Task, batch: dict, amp: str, device: torch.device) -> tuple[int, int]:
    """(bytes that autograd keeps of this batch, weights not counted; largest layer output)."""
    own = {t.untyped_storage().data_ptr() for t in (*task.model.parameters(), *task.model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself would be a circle that is never let go

    outputs = [0]

    def measure(module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append(output.nbytes)

    task.model.to(device).train()
    hooks = [module.register_forward_hook(measure) for module in task.model.modules()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(device, amp):
        task.loss(task.model, batch)
    for hook in hooks:
        hook.remove()
    return sum(kept.values()), max(outputs)
