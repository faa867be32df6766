"""One training step: LoRA, full and linear of ours, peft on transformers, the floor and the ceiling.

python -m tests.benchmarks.train_step                       # all models, two CPU threads, float32
python -m tests.benchmarks.train_step --models vit-tiny --rounds 30 --save
python -m tests.benchmarks.train_step --device cuda --amp bf16 --base bf16 --save
python -m tests.benchmarks.train_step --targets six --r 4 --norms --models vit-tiny --batch 64 --save
python -m tests.benchmarks.train_step --bf16                # bf16 autocast and a bf16 base beside float32, one run
"""

from pathlib import Path

from tests.benchmarks.common import interleaved, parser, prepare, ratio, report, told
from tests.benchmarks.models import SPECS, Case, add_method, method


def candidates(case: Case, arguments) -> dict:
    """name -> step. Only a few models are alive at a time: what is not asked for is not built."""
    amp, base = arguments.amp, arguments.base
    steps = {
        "full": case.ours("full", amp=amp),
        "lora": case.ours("lora", 0.0, amp, base),
        "lora .05": case.ours("lora", 0.05, amp, base),
        "linear": case.ours("linear", amp=amp, base=base),
        "full, all tokens": case.ours("full", amp=amp, pooled=False),
        "lora, all tokens": case.ours("lora", 0.0, amp, base, pooled=False),
        "floor": case.floor(amp),
    }
    if not arguments.no_peers:
        steps["peft"], steps["peft .05"] = case.peft(0.0, amp), case.peft(0.05, amp)
        steps["transformers full"] = case.peft(0.0, amp, mode="full")
    return steps


def bf16_candidates(case: Case) -> dict:
    """The LoRA step, and the full one, in float32 and in bf16: autocast, with the frozen weights in bf16 too."""
    return {
        "full": case.ours("full"),
        "full bf16": case.ours("full", amp="bf16"),
        "lora": case.ours("lora"),
        "lora bf16, fp32 base": case.ours("lora", amp="bf16"),
        "lora bf16": case.ours("lora", amp="bf16", base="bf16"),
        "peft bf16": case.peft(amp="bf16"),
    }


def measure_bf16(name: str, arguments) -> tuple[dict, dict]:
    case = Case(name, arguments.device, arguments.batch, **method(arguments))
    seconds = interleaved(bf16_candidates(case), arguments.rounds, arguments.device)
    row = {
        "model": f"{name}, batch {case.batch}",
        "lora bf16 ms": f"{1e3 * sorted(seconds['lora bf16'])[len(seconds['lora bf16']) // 2]:.0f}",
        "lora, float32 / bf16": told(ratio(seconds["lora"], seconds["lora bf16"])),
        "same, base in float32": told(ratio(seconds["lora"], seconds["lora bf16, fp32 base"])),
        "full, float32 / bf16": told(ratio(seconds["full"], seconds["full bf16"])),
        "peft / lora, both bf16": told(ratio(seconds["peft bf16"], seconds["lora bf16"])),
        "full / lora, both bf16": told(ratio(seconds["full bf16"], seconds["lora bf16"])),
    }
    return row, seconds


def cpu_bf16() -> str:
    """Which bf16 instructions the processor has."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    return ", ".join(sorted(words & {"avx512_bf16", "amx_bf16"})) or "no bf16 instructions"


def measure(name: str, arguments) -> tuple[dict, dict]:
    case = Case(name, arguments.device, arguments.batch, **method(arguments))
    ceiling = case.ceiling()
    seconds = interleaved(candidates(case, arguments), arguments.rounds, arguments.device)
    speedup = ratio(seconds["full"], seconds["lora"])
    row = {
        "model": f"{name}, batch {case.batch}",
        "lora ms": f"{1e3 * sorted(seconds['lora'])[len(seconds['lora']) // 2]:.0f}",
        "full / lora": told(speedup),
        "ceiling": f"{ceiling:.2f}",
        "share of ceiling": f"{speedup[0] / ceiling:.0%}",
        "all tokens": told(ratio(seconds["full, all tokens"], seconds["lora, all tokens"])),
        "lora / floor": told(ratio(seconds["lora"], seconds["floor"])),
        "linear / lora": told(ratio(seconds["linear"], seconds["lora"])),
    }
    if "peft" in seconds:
        row["peft / lora"] = told(ratio(seconds["peft"], seconds["lora"]))
        row["same, dropout .05"] = told(ratio(seconds["peft .05"], seconds["lora .05"]))
        row["transformers full / our full"] = told(ratio(seconds["transformers full"], seconds["full"]))
    return row, seconds


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--models", nargs="+", default=list(SPECS), choices=list(SPECS))
    flags.add_argument("--batch", type=int, default=None)
    flags.add_argument("--amp", default="fp32", choices=("fp32", "bf16", "fp16"))
    flags.add_argument("--base", default="fp32", choices=("fp32", "bf16", "fp16"), help="dtype of the frozen weights")
    flags.add_argument("--no-peers", action="store_true", help="leave transformers and peft out")
    flags.add_argument("--bf16", action="store_true", help="float32 beside bf16, and nothing else")
    add_method(flags)
    arguments = flags.parse_args()
    told_of = cpu_bf16() if arguments.bf16 else f"amp {arguments.amp}, frozen weights {arguments.base}"
    told_of += f", LoRA r {arguments.r} on {arguments.targets}" + ", norms too" * arguments.norms
    header = f"{prepare(arguments)}; {told_of}, {arguments.rounds} rounds"
    suffix = f"{arguments.device.split(':')[0]}_{'bf16_beside_fp32' if arguments.bf16 else arguments.amp}"
    suffix += "_six" * (arguments.targets == "six")
    for name in arguments.models:  # a file for each, so that they can be measured one at a time
        row, seconds = (measure_bf16 if arguments.bf16 else measure)(name, arguments)
        report(f"train_step_{suffix}_{name}", header, [row], arguments.save, seconds)


if __name__ == "__main__":
    main()
