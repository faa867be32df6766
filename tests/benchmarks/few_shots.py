"""Few shots: clip-nano on generated pictures with class names, zero-shot and K = 1 .. 16, names beside a linear head.

    python tests/benchmarks/few_shots.py --output few_shots [--heads names linear]

16 classes ("red circle"), 20 pictures of each in train, 10 in val, which chooses the epoch, 30 in test, which is scored
once a run. LoRA r=8 on q and v of both towers (linear: of the picture tower, and the layer), 30 steps per shot.
"""

import argparse
import sys
from pathlib import Path

from minilora.commands import shots
from minilora.data.generated.shapes import ShapesSplit, task_classes

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle", "star")
PARTS = {"train": 20, "val": 10, "test": 30}


def write_pictures(root: Path) -> Path:
    """Class folders such as train/red_circle/0001.png."""
    names = task_classes("source")
    kept = [i for i, name in enumerate(names) if name.split()[0] in COLOURS and name.split()[1] in SHAPES]
    for part, each in PARTS.items():
        pictures = ShapesSplit("source", part, 0, [turn * len(names) + i for turn in range(each) for i in kept])
        for i, sample in enumerate(pictures):
            folder = root / part / names[sample.label].replace(" ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            pictures.load(i).save(folder / f"{i:04d}.png")
    return root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--heads", nargs="+", default=["names", "linear"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    options = parser.parse_args()
    data = write_pictures(options.output / "pictures")
    words = ["--data-dir", str(data), "--model", "clip-nano", "--steps-per-shot", "30", "--epochs", "3"]
    words += ["--heads", *options.heads, "--seeds", *options.seeds, "--workers", "0", "--device", "cpu"]
    return shots.main([*words, "--output", str(options.output / "runs")])


if __name__ == "__main__":
    sys.exit(main())
