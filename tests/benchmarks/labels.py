"""Unequal classes with and without --class-weights, and several labels with LoRA beside the head alone.

    python -m tests.benchmarks.labels dogs --output DIR --search --seeds 0     which rate, on held-out training pictures
    python -m tests.benchmarks.labels dogs --output DIR              three seeds each, scored on the 400 test pictures
    python -m tests.benchmarks.labels scenes --output DIR

dogs: ImageWoof cut to 120, 89, 66, 49, 36, 27, 20, 15, 11 and 8 training pictures of a class, a fifth of them held
out, which chooses the epoch by balanced accuracy; DeiT-tiny, LoRA r 8 on q and v. scenes: generated pictures of one or
two coloured shapes, whose 6 shapes and 6 colours are the labels; the bundled nano ViT.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.common import markdown
from tests.conftest import shared_folder
from tests.support.cli_data import ROOT
from tests.support.label_data import write_scenes

COUNTS = [round(120 * (8 / 120) ** (c / 9)) for c in range(10)]
RATES = ("1e-3", "2e-3", "4e-3")
CHOSEN = {"none": "4e-3", "auto": "2e-3"}  # by --search


def write_dogs(root: Path) -> Path:
    """The cut as class folders: train/, and val/ of ImageWoof as test/."""
    source = shared_folder() / "imagewoof224"
    for count, folder in zip(COUNTS, sorted((source / "train").iterdir()), strict=True):
        for part, name, most in (("train", "train", count), ("test", "val", None)):
            target = root / part / folder.name
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted((source / name / folder.name).iterdir())[:most]:
                shutil.copyfile(file, target / file.name)
    return root


def train(output: Path, flags: list[str], seeds: list[str]) -> list[dict]:
    """The summaries of train.py --seeds; finished runs are not made again."""
    words = [*flags, "--output", str(output), "--seeds", *seeds, "--device", "cpu"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True)
    return [json.loads((Path(f"{output}-seed-{seed}") / "summary.json").read_text()) for seed in seeds]


def cell(runs: list[dict], part: str, key: str) -> str:
    values = [100 * run[part][key] for run in runs]
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def dogs(options: argparse.Namespace) -> list[dict]:
    weights = shared_folder() / "weights" / "deit_tiny_patch16_224.fp16.safetensors"
    flags = ["--data-dir", str(write_dogs(options.output / "dogs")), "--model", "vit-tiny-patch16-224"]
    flags += ["--weights", str(weights), "--val-split", "0.2", "--metric", "balanced", "--epochs", "4"]
    rows = []
    for kind in ("none", "auto"):
        for lr in RATES if options.search else (CHOSEN[kind],):
            more = ["--class-weights", kind, "--lr", lr]
            runs = train(options.output / f"dogs-{kind}-{lr}", flags + more, options.seeds)
            row = {"--class-weights": kind, "--lr": lr, "seeds": len(runs)}
            row |= {"held out: balanced %": cell(runs, "best", "balanced")}
            if not options.search:
                row |= {f"test: {name} %": cell(runs, "test", name) for name in ("balanced", "accuracy", "f1")}
            rows.append(row)
    return rows


def scenes(options: argparse.Namespace) -> list[dict]:
    table = write_scenes(options.output / "scenes", train=1500, val=300, test=600, bare=0)
    rows = []
    for mode in ("linear", "lora"):
        flags = ["--multi-label", "--data-dir", str(table), "--mode", mode, "--epochs", "8"]
        runs = train(options.output / f"scenes-{mode}", flags, options.seeds)
        trained = runs[0]["parameters"]["trainable"]
        row = {"mode": mode, "trained": f"{trained:,}", "seeds": len(runs)}
        names = {"mean average precision": "map", "F1": "f1", "all labels right": "accuracy"}
        rows.append(row | {f"test: {name} %": cell(runs, "test", key) for name, key in names.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("dogs", "scenes"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument(
        "--search", action="store_true", help="the rates of RATES, scored on the held-out pictures alone"
    )
    options = parser.parse_args()
    print(markdown((dogs if options.what == "dogs" else scenes)(options)))


if __name__ == "__main__":
    main()
