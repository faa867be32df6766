"""Several processes, one model: who am I, what is my share, and sums over everybody.

Start with `torchrun --nproc-per-node N train.py ...`. Without torchrun every function here is that
of a lone process.

A task cuts an epoch into the batches of whole optimizer steps, of batch_size * grad_accum_steps *
world_size items; each is cut here into as many microbatches as there are turns, and process r takes
numbers r, r + world_size, ... of them. So 2 processes with batch b, 1 process with batch 2b, and 1
with batch b and two accumulation steps see the same items, step by step.

A checkpoint knows no number of processes. A run resumed by another number takes up the epoch at the
same item; with --grad-accum-steps changed so that a step keeps its items, the weights are
equal to rounding (without dropout, whose random numbers are each process's own). Files are written
by rank 0: on several machines the run directory is on a shared disk.
"""

import inspect
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minilora.errors import UserError


def rank() -> int:
    """Number of this process, 0 in a lone one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 in a lone one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def start(device: str | torch.device) -> torch.device:
    """Joins torchrun's group, nccl on GPUs, gloo on CPUs; returns this rank's device."""
    device = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node asks for GPU {local} but this machine has {torch.cuda.device_count()}; "
                "start fewer processes or use --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    cuda = device.type == "cuda"
    store, rank, size = next(dist.rendezvous("env://"))
    where = {"store": dist.PrefixStore(f"start-{restarts()}", store), "rank": rank, "world_size": size}
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, **where)
    return device


def restarts() -> str:
    """How often torchrun has started these processes again, "0" on several machines.

    It keeps one store over all of its starts. Without a part of its own for each, a process finds
    the addresses of processes that have died, and waits for them. Several machines each count for
    themselves: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every start its own store.
    """
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"


def stop() -> None:
    """Leaves the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """Adds `values` over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_objects(value: object) -> list:
    """[value of rank 0, of rank 1, ...] in every process; for small objects."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gathered(batches: list[list[int]], answer: Callable[[list[list[int]]], Iterable[np.ndarray]]) -> list[np.ndarray]:
    """The columns that `answer` makes of batches of item numbers, in the order of the items; each
    process answers its share. answer: batches -> columns (rows, ...), a row per item in order."""
    mine = batches[rank() :: world_size()]
    shares = gather_objects(tuple(answer(mine)) if mine else None)
    order = [batch for r in range(len(shares)) for batch in batches[r :: len(shares)]]
    columns = zip(*(share for share in shares if share is not None), strict=True)
    return in_item_order(order, [np.concatenate(column) for column in columns])


def in_item_order(batches: list[list[int]], columns: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Columns (rows, ...) whose rows stand as the items in `batches`, by number of the item."""
    back = np.argsort([item for batch in batches for item in batch])
    return [column[back] for column in columns]


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every process rank 0's buffers (BatchNorm statistics): all evaluate the same model."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


class TaskLoss(nn.Module):
    """task.loss as a module, so that DistributedDataParallel sees one forward whatever it calls."""

    def __init__(self, task: object) -> None:
        super().__init__()
        self.model, self.loss = task.model, task.loss

    def forward(self, batch: dict) -> tuple[Tensor, dict]:
        return self.loss(self.model, batch)


def wrap(module: nn.Module) -> nn.Module:
    """Averages gradients over the processes in backward; a lone process gets its module back."""
    if not dist.is_initialized():
        return module
    # torch 2.15 renamed broadcast_buffers
    parameters = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{sync: False})


def no_sync(module: nn.Module, wait: bool) -> AbstractContextManager:
    """While `wait`, gradients are only added up; a step's last microbatch exchanges the sum."""
    return module.no_sync() if wait and isinstance(module, DistributedDataParallel) else nullcontext()


@dataclass
class Step:
    """This process's share of one optimizer step.

    batches[i] goes through the loss with factor weights[i]: with n items in the whole step,
    len(batch) / n times world_size, because DistributedDataParallel divides by it. Factors make
    ragged ends equal to one big batch.
    """

    batches: list[list[int]]
    weights: list[float]
    items: int  # in the whole step, over all processes


def skip_items(batches: list[list[int]], done: int) -> list[list[int]]:
    """What is left of an epoch's batches after its first `done` items."""
    left = []
    for batch in batches:
        if done < len(batch):
            left.append(batch[done:])
        done = max(0, done - len(batch))
    return left


def joined(batches: list[list[int]], least: int) -> list[list[int]]:
    """The batches with each of fewer than `least` items joined to the one before, the first to the
    next. Where all are so small, somebody wanted it."""
    if max(map(len, batches), default=0) < least:
        return batches
    whole: list[list[int]] = []
    for batch in batches:
        if whole and min(len(batch), len(whole[-1])) < least:
            whole[-1] = whole[-1] + batch
        else:
            whole.append(batch)
    return whole


def turns(grad_accum_steps: int) -> int:
    """Microbatches of one optimizer step, over all processes."""
    return grad_accum_steps * world_size()


def share_steps(batches: list[list[int]], grad_accum_steps: int, least: int = 1) -> list[Step]:
    """This process's share of the steps: each batch is cut into `turns` microbatches of at least
    `least` items, every world_size-th is ours."""
    world, me = world_size(), rank()
    steps = []
    for batch in batches:
        size = max(least, -(-len(batch) // turns(grad_accum_steps)))  # rounded up
        parts = joined([batch[i : i + size] for i in range(0, len(batch), size)], least)
        mine = parts[me::world]
        weights = [len(part) * world / len(batch) for part in mine]
        # a short last step: take part in the exchange with a borrowed batch that counts nothing
        if not mine:
            mine, weights = parts[:1], [0.0]
        steps.append(Step(mine, weights, len(batch)))
    return steps
