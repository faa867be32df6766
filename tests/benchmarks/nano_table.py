"""The README's first table: scratch, linear, LoRA and full on the generated shapes with the bundled nano ViT.

    python -m tests.benchmarks.nano_table --save             # 4 modes, best of 3 learning rates, 3 seeds

Every run is one `train.py` command. The learning rate is chosen on the validation pictures with seed 0; the
table shows the test accuracy over the seeds. Finished runs are kept in results/nano_table.runs.json and not
run again.
"""

import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

import train
from tests.benchmarks.common import RESULTS, parser, prepare, report

LR = {
    "scratch": (5e-4, 1e-3, 2e-3),
    "linear": (1e-2, 3e-2, 1e-1),
    "lora": (2e-3, 5e-3, 1e-2),
    "full": (3e-4, 5e-4, 1e-3),
}
FLAGS = {
    "scratch": ["--mode", "full", "--weights", "none"],
    "linear": ["--mode", "linear", "--cache-features"],
    "lora": ["--mode", "lora"],
    "full": ["--mode", "full"],
}


def run(mode: str, lr: float, seed: int) -> dict:
    """One training run; what the table needs of its summary.json."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        argv = [*FLAGS[mode], "--lr", str(lr), "--seed", str(seed), "--output", f"{folder}/run"]
        if train.main(argv):
            raise RuntimeError(f"train.py {' '.join(argv)} failed")
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    keep = ("trainable", "total", "seconds")
    found = {"val": summary["best"]["accuracy"], "test": summary["test"]["accuracy"]}
    return found | {key: summary.get(key, summary.get("parameters", {}).get(key)) for key in keep}


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--modes", nargs="+", default=list(LR), choices=list(LR))
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = flags.parse_args()
    header = prepare(arguments)
    path = RESULTS / "nano_table.runs.json"
    done = json.loads(path.read_text()) if path.exists() else {}

    def once(mode: str, lr: float, seed: int) -> dict:
        key = f"{mode} {lr:g} {seed}"
        if key not in done:
            done[key] = run(mode, lr, seed)
            print(key, done[key], flush=True)
            if arguments.save:
                RESULTS.mkdir(exist_ok=True)
                path.write_text(json.dumps(done, indent=1) + "\n")
        return done[key]

    rows = []
    for mode in arguments.modes:
        best = max(LR[mode], key=lambda lr, mode=mode: once(mode, lr, arguments.seeds[0])["val"])
        runs = [once(mode, best, seed) for seed in arguments.seeds]
        scores = [100 * one["test"] for one in runs]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        share = 100 * runs[0]["trainable"] / runs[0]["total"]
        rows.append(
            {
                "mode": mode,
                "lr": f"{best:g}",
                "trainable": f"{runs[0]['trainable']:,} ({share:.1f} %)",
                "test accuracy %": f"{statistics.mean(scores):.1f}{spread}",
                "seconds": f"{statistics.mean(one['seconds'] for one in runs):.0f}",
            }
        )
    report("nano_table", header, rows, arguments.save)


if __name__ == "__main__":
    main()
