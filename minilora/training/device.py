"""Where a run computes, in which precision, and how its batches come there.

On a GPU "fp32" is float32 to the last bit: torch leaves TensorFloat-32 off, and so does this
project. Who wants the tensor cores takes bf16 or fp16.
"""

import contextlib
import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minilora.errors import RunError, UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(wanted: str) -> torch.device:
    """--device as a torch.device; auto is the first GPU if there is one."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(
            f"--device {wanted}: this machine has {found or 'no'} CUDA device{'s' * (found > 1)}; try --device cpu"
        )
    if device.index is not None and device.type == "cuda":
        # pinned memory, clocks and "does it know bf16" ask about the current GPU
        torch.cuda.set_device(device)
    return device


def set_deterministic(on: bool) -> None:
    """--deterministic: on a GPU only kernels that add in a fixed order.

    Where torch has none, the operation raises RuntimeError. With a warning in its place (warn_only)
    torch would leave the gradient of attention as it is, which has such a kernel.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    if on or torch.are_deterministic_algorithms_enabled():  # the call alone loads torch's compiler
        torch.use_deterministic_algorithms(on)
    # to fill new memory with NaN finds mistakes in kernels, and takes time
    torch.utils.deterministic.fill_uninitialized_memory = not on


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """The precision `amp` (a key of DTYPES) as a context; weights and gradients stay float32."""
    return torch.autocast(device.type, dtype=DTYPES[amp], enabled=amp != "fp32")


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on the device. A GPU copies out of pinned memory, for which the
    host does not wait."""
    pin = device.type == "cuda"
    tensors = {k: v.pin_memory() if pin and v.is_cpu else v for k, v in batch.items() if isinstance(v, Tensor)}
    return batch | {k: v.to(device, non_blocking=True) for k, v in tensors.items()}


def compile_blocks(model: nn.Module) -> None:
    """torch.compile on every transformer block, else on the whole model; in place, so that the
    names of parameters stay.

    Blocks of one shape share one compilation, which so takes seconds however many there are. The
    kinds of block, batch and mode together are more than the 8 after which torch gives up.
    """
    settings, limit = torch._dynamo.config, "recompile_limit"
    limit = limit if hasattr(settings, limit) else "cache_size_limit"  # its old name
    setattr(settings, limit, max(64, getattr(settings, limit)))
    lists = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    for module in [block for blocks in lists for block in blocks] or [model]:
        module.compile()


class Feed:
    """The batches of a loader, each beside its copy on the device: next(feed) -> (batch, copy).

    `ahead()` is called when a step's work is on its way: a GPU then gets the next batch on a stream
    of its own while it computes, and the host reads it before it waits. A CPU has nothing to gain.
    `wait()` returns when the next batch is here, or raises what reading it has raised.
    """

    def __init__(self, loader: Iterable[dict], device: torch.device):
        self.loader, self.device = iter(loader), device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ready: tuple[dict, dict] | Exception | None = None

    def ahead(self) -> None:
        if self.stream is not None:
            with torch.cuda.stream(self.stream), contextlib.suppress(StopIteration):
                try:
                    self.ready = self.fetch()
                except (RunError, UserError) as error:  # a matter of the next step, not of this one
                    self.ready = error

    def wait(self) -> None:
        if self.ready is None:
            self.ready = self.fetch()
        if isinstance(self.ready, Exception):
            raise self.ready

    def __next__(self) -> tuple[dict, dict]:
        self.wait()
        (batch, copy), self.ready = self.ready, None
        if self.stream is not None:
            compute = torch.cuda.current_stream(self.device)
            compute.wait_stream(self.stream)
            for tensor in copy.values():
                if isinstance(tensor, Tensor):
                    # else its memory is free for the next copy too early
                    tensor.record_stream(compute)
        return batch, copy

    def fetch(self) -> tuple[dict, dict]:
        batch = next(self.loader)
        return batch, to_device(batch, self.device)
