"""The ways in which a training step fails, as one line each that says what to try."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from minilora.errors import RunError
from minilora.training.distributed import gather_objects, world_size
from minilora.training.progress import peak_memory_mb

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "ProcessGroup",
    "Gloo",
)


def explain_nonfinite(task: object, model: nn.Module, step: int, loss: float, seen: list[tuple]) -> str:
    """Says which number of which step is not finite and names the files of its batch, on whatever process
    they were.

    `seen` holds (batch, loss, stats) of this process's microbatches. A task may put {"terms": {name:
    tensor}} into its stats; the terms that are not finite are then named.
    """
    if math.isfinite(loss):
        broken = [
            n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        ]
        what = f"the gradient of {broken[0]}" if broken else "the gradient's norm"
        guilty = seen
    else:
        guilty = [entry for entry in seen if not entry[1].isfinite()]
        terms = {n for _, _, stats in guilty for n, t in stats.get("terms", {}).items() if not t.isfinite()}
        what = f"the loss ({', '.join(sorted(terms)) or loss})"
    files = [
        name for names in gather_objects([task.describe(batch) for batch, _, _ in guilty]) for name in names
    ]
    return f"step {step}: {what} is not finite; batch: {'; '.join(files)}"


@contextmanager
def readable_errors(device: torch.device, batch_size: int, where: str, newest: Path | None) -> Iterator[None]:
    """Turns out-of-memory and a lost process into a RunError of one line; every other error passes."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        kept = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
        if isinstance(error, torch.OutOfMemoryError) or any(text in message for text in OUT_OF_MEMORY):
            raise RunError(
                f"out of memory on {device} at {where} with batch size {batch_size}, peak "
                f"{peak_memory_mb(device):.0f} MiB: try --batch-size {max(1, batch_size // 2)} with "
                f"--grad-accum-steps 2, --amp bf16 or --grad-checkpointing; {kept}"
            ) from error
        if world_size() > 1 and any(text in message for text in LOST_PEER):
            raise RunError(f"another process of this run died at {where}; {kept}") from error
        raise
