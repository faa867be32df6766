"""One training step on a GPU, eager and compiled, with and without --deterministic, beside peft and the floor.

    python -m tests.benchmarks.cuda_step --save
    python -m tests.benchmarks.cuda_step --models vit-tiny --batch 32 --profile

"host" is the time until the last kernel is launched: where it is near the whole, the host is what limits, and a machine
that is shared with others has no one speed: compare only what was repeated.
"""

import statistics
import time
from collections.abc import Callable

import torch

from minilora.training.device import set_deterministic
from minilora.training.trainer import compile_blocks
from tests.benchmarks.common import parser, prepare, report, synchronize
from tests.benchmarks.models import SPECS, Case


def compiled(step: Callable) -> Callable:
    torch._dynamo.reset()
    compile_blocks(step.model)
    return step


def candidates(case: Case, amp: str) -> dict[str, Callable]:
    """{name: maker of a step}; one is alive at a time."""
    made = {}
    for p in (0.0, 0.05):
        made[f"lora, dropout {p:g}"] = lambda p=p: case.ours("lora", p, amp, amp)
        made[f"lora, dropout {p:g}, deterministic"] = lambda p=p: case.ours("lora", p, amp, amp)
        made[f"peft, dropout {p:g}"] = lambda p=p: case.peft(p, amp)
        made[f"lora, dropout {p:g}, compiled"] = lambda p=p: compiled(case.ours("lora", p, amp, amp))
    made["lora, frozen weights in fp32"] = lambda: case.ours("lora", 0.0, amp, "fp32")
    return made | {"full": lambda: case.ours("full", amp=amp), "floor": lambda: case.floor(amp)}


def measure(name: str, make: Callable, arguments) -> dict:
    """A row: median milliseconds of the step and of the host's part, peak MiB."""
    set_deterministic("deterministic" in name)
    start = time.perf_counter()
    step = make()
    for _ in range(4):
        step()
    synchronize(arguments.device)
    warm = time.perf_counter() - start
    whole, host = [], []
    gpu = arguments.device.startswith("cuda")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
        synchronize(arguments.device)
        whole.append(time.perf_counter() - start)
    set_deterministic(False)
    peak = torch.cuda.max_memory_allocated() / 2**20 if gpu else float("nan")
    times = {"ms": statistics.median(whole), "host ms": statistics.median(host)}
    row = {"step": name} | {key: f"{1e3 * value:.2f}" for key, value in times.items()}
    return row | {"peak MiB": f"{peak:.0f}", "made and warm, s": f"{warm:.1f}"}


def profile(step: Callable, device: str) -> str:
    """torch's table of the dearest operators (on a GPU: kernels) of one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    step(), step()
    kind = device.split(":")[0]
    with watch(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kind == "cuda" else [])]) as seen:
        step()
        synchronize(device)
    return seen.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=20, max_name_column_width=60)


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--models", nargs="+", default=["vit-base"], choices=list(SPECS))
    flags.add_argument("--batch", type=int, default=None)
    flags.add_argument("--depth", type=int, default=None, help="blocks, all of them if it is left out")
    flags.add_argument("--amp", default="bf16", choices=("fp32", "bf16", "fp16"))
    flags.add_argument("--profile", action="store_true", help="print the dearest kernels of a step")
    arguments = flags.parse_args()
    header = prepare(arguments) + f"; amp {arguments.amp}, median of {arguments.rounds} steps"
    for name in arguments.models:
        case = Case(name, arguments.device, arguments.batch, arguments.depth)
        rows = []
        for title, make in candidates(case, arguments.amp).items():
            rows.append(measure(title, make, arguments))
            print(" | ".join(rows[-1].values()), flush=True)
        where = arguments.device.split(":")[0]
        report(f"step_{where}_{arguments.amp}_{name}", f"{header}; {name}, batch {case.batch}", rows, arguments.save)
        if arguments.profile:
            print(profile(case.ours("lora", 0.05, arguments.amp, arguments.amp), arguments.device))


if __name__ == "__main__":
    main()
