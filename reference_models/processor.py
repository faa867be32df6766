"""Which form is the faster one on this processor: fixed rules, from what it can do. Nothing is
timed in a run, so that a machine always gives the same bits, also when it is busy."""

from pathlib import Path

import torch
from torch import Tensor

try:
    _WORDS = frozenset(Path("/proc/cpuinfo").read_text().split())
except OSError:
    _WORDS = frozenset()


def instructions() -> frozenset[str]:
    """The instruction sets in Linux's /proc/cpuinfo, such as avx512f, avx512_bf16 and amx_bf16;
    none elsewhere. Read once: torch.compile cannot follow into a file."""
    return _WORDS


def has(name: str) -> bool:
    """Whether the processor has an instruction set."""
    return name in instructions()


def written_out_pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether attention is faster written out than by torch's fused kernel, by the table of
    tests/benchmarks/attention.py:

        on a CPU     with a gradient              without
        float32      fused                        fused
        bfloat16     written out, with AVX-512    written out, with avx512_bf16 and no AMX
        float16      fused                        fused

    The fused kernel has no good backward in bfloat16, 2 to 10 times slower than plain products; for
    those the softmax (B, h, T, T) is kept. Forward it converts more than it multiplies, which AMX
    does best. Without AVX-512 plain products of bfloat16 are slow. On a GPU fused always.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return has("avx512f")
    return has("avx512_bf16") and not has("amx_bf16")
