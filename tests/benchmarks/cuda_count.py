"""What one training step launches on a GPU, counted from shapes: kernels, bytes through memory, the time that they
would take at best on an H100, and the bytes kept for backward. No GPU is needed, and nothing is timed.

    python -m tests.benchmarks.cuda_count                     # vit-base, batch 128, bf16, ours beside peft
    python -m tests.benchmarks.cuda_count --models vit-base bert-base --only "ours p=0" --kernels

Every operation of the step runs on fake CUDA tensors (tests/support/fake_cuda.py). Its time is the longest of its
products at 550 TFLOP/s, its bytes at 2.6 TB/s and 2 us, the shortest kernel. The optimizer is not counted.
"""

import argparse
from collections import Counter
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minilora.inject import cast_frozen
from tests.benchmarks.common import report
from tests.benchmarks.models import Case
from tests.support.fake_cuda import CUDA, gpu, move

RATE, BANDWIDTH, LEAST = 550e12, 2.6e12, 2e-6
# no kernel: memory that is only reserved, or seen in another shape
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "detach",
}


class Kernels(TorchDispatchMode):
    """Counts the operations that launch a kernel, with their bytes and their least time."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.device == CUDA]
        if view or name in FREE or space == "prim" or not tensors:
            return out
        size = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        flops = flop_registry.get(func.overloadpacket)
        work = flops(*args, **(kwargs or {}), out_val=out) if flops else 0
        self.count[name] += 1
        self.bytes[name] += size
        self.seconds[name] += max(work / RATE, size / BANDWIDTH, LEAST)
        return out


def flash(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, p=0.0, is_causal=False, **options
) -> Tensor:
    """The kernels that torch takes on a GPU; without a driver it cannot ask for them."""
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    q, k, v, options = q.to(half), k.to(half), v.to(half), {"scale": options.get("scale")}
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, p, is_causal, **options)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=half).masked_fill_(~attn_mask, float("-inf"))
    mask = attn_mask.to(half).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, p, is_causal, **options)[0]


def candidates(case: Case) -> dict:
    """{name: (step, dtype that its frozen weights are cast to)}."""
    return {
        "ours p=0, base bf16": lambda: (case.ours("lora", 0.0, "bf16", "bf16"), None),
        "ours p=.05, base bf16": lambda: (case.ours("lora", 0.05, "bf16", "bf16"), None),
        "ours p=0, base fp32": lambda: (case.ours("lora", 0.0, "bf16", "fp32"), None),
        "ours full": lambda: (case.ours("full", amp="bf16"), None),
        "peft p=0, base bf16": lambda: (case.peft(0.0, "bf16"), torch.bfloat16),
        "peft p=.05, base bf16": lambda: (case.peft(0.05, "bf16"), torch.bfloat16),
        "peft p=0, base fp32": lambda: (case.peft(0.0, "bf16"), None),
    }


def counted(case: Case, make) -> tuple[Kernels, Kernels, int]:
    """The forward and the backward pass of a candidate, and the bytes that it keeps for backward."""
    step, dtype = make()
    model = step.model if dtype is None else cast_frozen(step.model, dtype)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    with gpu(), patch.object(F, "scaled_dot_product_attention", flash):
        move(model, CUDA)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        for name in ("images", "labels", "ids", "mask"):
            setattr(case, name, torch.empty_like(getattr(case, name), device=CUDA))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cuda", dtype=torch.bfloat16):
            case.loss(model)
        size = sum(n for storage, n in kept.items() if storage not in own)
        alive.clear()
        with Kernels() as forward, torch.autocast("cuda", dtype=torch.bfloat16):
            loss = case.loss(model)
        with Kernels() as backward:
            loss.backward()
    case.make_batch()
    return forward, backward, size


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--models", nargs="+", default=["vit-base"])
    flags.add_argument("--batch", type=int, default=128)
    flags.add_argument("--depth", type=int, default=None, help="blocks, all of them if it is left out")
    flags.add_argument("--only", default="", help="candidates whose names begin like this")
    flags.add_argument("--kernels", action="store_true", help="list the dearest kernels of each")
    flags.add_argument("--save", action="store_true", help="write Markdown into tests/benchmarks/results")
    arguments = flags.parse_args()
    rows, lists = [], []
    for name in arguments.models:
        case = Case(name, "cpu", arguments.batch, arguments.depth)
        for title, make in candidates(case).items():
            if not title.startswith(arguments.only):
                continue
            forward, backward, kept = counted(case, make)
            seconds = [sum(one.seconds.values()) for one in (forward, backward)]
            gigabytes = sum(sum(one.bytes.values()) for one in (forward, backward)) / 1e9
            rows.append({
                f"step of {name}, batch {arguments.batch}": title,
                "kernels": f"{sum(forward.count.values())} + {sum(backward.count.values())}",
                "GB": f"{gigabytes:.1f}",
                "ms at best": f"{1e3 * seconds[0]:.2f} + {1e3 * seconds[1]:.2f} = {1e3 * sum(seconds):.2f}",
                "kept MiB": f"{kept / 2**20:.0f}",
            })  # fmt: skip
            print(" | ".join(rows[-1].values()), flush=True)
            for part, one in (("forward", forward), ("backward", backward)):
                dear = [f"{k} x{one.count[k]} {1e3 * s:.2f} ms" for k, s in one.seconds.most_common(14)]
                lists.append(f"{title}, {part}: {'; '.join(dear)}")
    header = "counted on fake CUDA tensors with torch " + torch.__version__.split("+")[0]
    report("cuda_count", header, rows, arguments.save)
    print(*(lists if arguments.kernels else ()), sep="\n")


if __name__ == "__main__":
    main()
