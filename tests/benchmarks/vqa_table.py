"""The README's VQA tables: question-only, scratch, linear, LoRA and full on real questions, with time and memory.

    python -m tests.benchmarks.vqa_table easy_vqa --seeds 0 1 2 --output /tmp/vqa
    python -m tests.benchmarks.vqa_table daquar_small --modes lora

Every run is one train.py command, which is printed; a run that is there already is not made again.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from minilora.data.vqa_sets import load_vqa, question_only_guess
from minilora.report.vqa_metric import score_vqa
from minilora.tasks import load_run

ROOT = Path(__file__).parents[2]
COMMON = {
    "easy_vqa": "--group-by-image --batch-size 128 --epochs 12",
    "daquar_small": "--group-by-image --batch-size 64 --epochs 12",
    "vqav2_small": "--group-by-image --batch-size 16 --epochs 12 --val-split 0.25",
}
MODES = {
    "scratch": "--weights none --mode full --lr 5e-4",
    "linear": "--mode linear --lr 5e-3",
    "lora": "--mode lora --lr 3e-3 --lora-r 16 --lora-alpha 32 --target-modules all-linear",
    "full": "--mode full --lr 5e-4",
}


def data_folder(name: str) -> Path:
    return Path(os.environ.get("MINILORA_SHARED", ROOT.parent / "shared" / "data")) / name


def train(name: str, mode: str, seed: int, output: Path) -> Path:
    """One run; its directory."""
    run_dir = output / f"{name}-{mode}-{seed}"
    if not (run_dir / "summary.json").is_file():
        words = shlex.split(f"--task vqa {COMMON[name]} {MODES[mode]} --seed {seed}")
        command = ["train.py", *words, "--data-dir", str(data_folder(name)), "--output", str(run_dir)]
        print("python", *command, flush=True)
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return run_dir


def greyed(run_dir: Path) -> float:
    """The run's score with the picture greyed out, in percent."""
    from minilora.flags_evaluate import EvalConfig

    scores = load_run(run_dir).evaluate(EvalConfig(device="cpu")).vqa["question_only"]
    return next(score for name, score in scores.items() if "greyed" in name)


def row(mode: str, runs: list[Path]) -> str:
    """A line of the table: mean and spread over the seeds."""
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    scores = [100 * one["best"]["accuracy"] for one in summaries]
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    seconds = statistics.mean(one["seconds"] for one in summaries)
    memory = max(one["peak_memory_mb"] for one in summaries)
    trainable = summaries[0]["parameters"]["trainable"]
    grey = statistics.mean(map(greyed, runs))
    return f"| {mode} | {trainable:,} | {statistics.mean(scores):.2f}{spread} | {grey:.2f} | {seconds:.0f} | {memory:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="+", choices=sorted(COMMON))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs") / "vqa-table")
    options = parser.parse_args()
    for name in options.sets:
        rows = [row(m, [train(name, m, s, options.output) for s in options.seeds]) for m in options.modes]
        splits = load_vqa(data_folder(name), val_split=0.25)
        guess = question_only_guess(splits.train.questions, splits.val.questions)
        scores = score_vqa(guess, [question.annotation() for question in splits.val.questions])
        print(
            f"\n{name}: {len(splits.val.questions):,} questions, {scores['metric']}, seeds {options.seeds}\n"
        )
        print("| mode | trainable | score % | picture greyed out % | seconds | peak MiB |")
        print("|---|---|---|---|---|---|")
        print(
            f"| question only (most frequent answer) | 0 | {scores['overall']:.2f} | {scores['overall']:.2f} | | |"
        )
        print(*rows, sep="\n", flush=True)


if __name__ == "__main__":
    main()
