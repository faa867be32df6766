"""Where a run computes, and in which precision."""

import contextlib

import torch
from torch import Tensor

from minilora.errors import UserError

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
    return device


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """The precision `amp` (a key of DTYPES) as a context; weights and gradients stay float32."""
    return torch.autocast(device.type, dtype=DTYPES[amp], enabled=amp != "fp32")


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on the device; copies from pinned memory do not block the host."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
