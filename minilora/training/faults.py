"""The ways in which a training step fails, as one line each that says what to try.

A process that dies on a GPU shows to the others not as an error but as silence: NCCL waits for it
until its watchdog ends them (ten minutes), unless torchrun, which saw it die, does so before.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minilora.errors import RunError
from minilora.training.distributed import gather_objects, world_size
from minilora.training.progress import peak_memory_mb

UNREADABLE = "counts: no picture can be read, or no answer is known; --bad-data error names the first of them"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "ProcessGroup", "Gloo")


def explain_nonfinite(task: object, model: nn.Module, loss: float, microbatches: list[tuple]) -> str:
    """Says which number of a step is not finite and names the files of its batch, on whatever
    process they were.

    microbatches: (batch, loss, stats) of each of this process's. A task may put {"terms": {name:
    tensor}} into its stats; the terms that are not finite are then named.
    """
    guilty, terms, what = microbatches, [], "the gradient's norm"
    if math.isfinite(loss):
        broken = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        what = f"the gradient of {broken[0]}" if broken else what
    else:
        guilty = [entry for entry in microbatches if not entry[1].isfinite()]
        terms = [n for _, _, stats in guilty for n, term in stats.get("terms", {}).items() if not term.isfinite()]
    found = gather_objects(([task.describe(batch) for batch, _, _ in guilty], terms))
    if not math.isfinite(loss):
        what = f"the loss ({', '.join(sorted({n for _, names in found for n in names})) or loss})"
    return f"{what} is not finite; batch: {'; '.join(f for files, _ in found for f in files)}"


def least_items(model: nn.Module) -> int:
    """2 for a model with a BatchNorm whose statistics move: one picture has no deviation."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    # torch's own move even where they are frozen
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return 1 + any(type(m) in plain or m.weight is None or m.weight.requires_grad for m in norms)


def first_line(message: str) -> str:
    """What a long message says first, cut to 200 characters."""
    return next((line.strip() for line in message.splitlines() if line.strip()), "no reason given")[:200]


def reason(error: Exception, device: torch.device, batch_size: int) -> str | None:
    """What an error of torch means for a run and what to try, None for one that is not known."""
    message = str(error)
    if isinstance(error, ValueError):
        few = "more than 1 value per channel" in message
        return "BatchNorm needs two items in a batch at least; try --batch-size 2" if few else None
    if isinstance(error, torch.OutOfMemoryError) or any(text in message for text in OUT_OF_MEMORY):
        return (
            f"out of memory on {device} with batch size {batch_size}, peak {peak_memory_mb(device):.0f} MiB. Try "
            f"--batch-size {max(1, batch_size // 2)} with --grad-accum-steps 2, --amp bf16 or --grad-checkpointing"
        )
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return (
            f"--compile failed: {first_line(message)}. On a CPU it needs a C++ compiler: g++, or one named by the "
            "variable CXX; without --compile the run works the same"
        )
    if "deterministic" in message and torch.are_deterministic_algorithms_enabled():
        cause = f"{first_line(message).partition(',')[0]} on {device}"
        return f"--deterministic: {cause}; without the flag the run works, but gives other bits each time"
    if world_size() > 1 and any(text in message for text in LOST_PEER):
        return "another process of this run died, see its own message; --resume continues"
    return None


@contextmanager
def readable_errors(device: torch.device, batch_size: int, where: Callable[[], str]) -> Iterator[None]:
    """Turns an error that `reason` knows into a RunError of one line; other errors pass."""
    try:
        yield
    except RunError:
        raise
    except (ValueError, RuntimeError) as error:
        if (known := reason(error, device, batch_size)) is None:
            raise
        raise RunError(f"{where()}: {known}") from error
