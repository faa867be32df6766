"""What one training step keeps for its backward pass, ours beside peft's and full fine-tuning.

    python -m tests.benchmarks.memory --save
    python -m tests.benchmarks.memory --device cuda --amp bf16 --save          # adds the peak of the GPU's
    memory

Bytes are those of the tensors that autograd saves, each storage counted once and parameters not at all
(torch.autograd.graph.saved_tensors_hooks). They do not depend on the machine.
"""

import torch

from tests.benchmarks.common import parser, prepare, report
from tests.benchmarks.models import SPECS, Case, add_method, method


def saved_bytes(case: Case, model: torch.nn.Module, amp: str) -> int:
    """Bytes saved for backward by one forward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself would be a circle, which holds the model for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), case.autocast(amp)():
        loss = case.loss(model)
    total = sum(storages.values())
    del loss
    return total


def peak(step, device: str) -> float:
    """Peak MiB of GPU memory over two steps; nan on a CPU."""
    if not device.startswith("cuda"):
        return float("nan")
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**20


def measure(name: str, arguments) -> dict:
    case, amp = Case(name, arguments.device, arguments.batch, **method(arguments)), arguments.amp
    makers = {
        "full": lambda: case.ours("full", amp=amp),
        "lora": lambda: case.ours("lora", 0.0, amp, arguments.base),
        "lora .05": lambda: case.ours("lora", 0.05, amp, arguments.base),
        "lora, all tokens": lambda: case.ours("lora", 0.0, amp, arguments.base, pooled=False),
        "peft": lambda: case.peft(0.0, amp),
        "peft .05": lambda: case.peft(0.05, amp),
    }
    sizes, peaks = {}, {}
    for key, make in makers.items():  # one model at a time
        step = make()
        sizes[key], peaks[key] = saved_bytes(case, step.model, amp), peak(step, arguments.device)
    row = {"model": f"{name}, batch {case.batch}"}
    row |= {f"{key} MiB": f"{size / 2**20:.1f}" for key, size in sizes.items()}
    row["lora / peft"] = f"{sizes['lora'] / sizes['peft']:.3f}"
    row["same, dropout .05"] = f"{sizes['lora .05'] / sizes['peft .05']:.3f}"
    if arguments.device.startswith("cuda"):
        row["GPU peak lora / peft"] = f"{peaks['lora'] / peaks['peft']:.3f}"
        row["GPU peak MiB"] = f"{peaks['lora']:.0f} / {peaks['peft']:.0f}"
    return row


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--models", nargs="+", default=list(SPECS), choices=list(SPECS))
    flags.add_argument("--batch", type=int, default=None)
    flags.add_argument("--amp", default="fp32", choices=("fp32", "bf16", "fp16"))
    flags.add_argument("--base", default="fp32", choices=("fp32", "bf16", "fp16"))
    add_method(flags)
    arguments = flags.parse_args()
    header = f"{prepare(arguments)}; amp {arguments.amp}, LoRA r {arguments.r} on {arguments.targets}"
    rows = [measure(name, arguments) for name in arguments.models]
    name = f"memory_{arguments.device.split(':')[0]}_{arguments.amp}" + "_six" * (arguments.targets == "six")
    report(name, header, rows, arguments.save)


if __name__ == "__main__":
    main()
