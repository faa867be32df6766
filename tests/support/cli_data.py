"""A small set of class folders, and the two programs as functions, for the tests of the command line."""

import importlib.util
from pathlib import Path

from minilora.data.generated.shapes import ShapesSplit

ROOT = Path(__file__).parents[2]
NANO = ["--model", "vit-nano-patch8-48", "--weights", "none"]
QUICK = [*NANO, "--epochs", "2", "--batch-size", "4", "--lr", "1e-3", "--device", "cpu"]


def program(name: str):
    """train.py or evaluate.py of the project as a module."""
    spec = importlib.util.spec_from_file_location(f"minilora_program_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_photos(root: Path, train: int = 4, val: int = 2, test: int = 0, classes: int = 3) -> Path:
    """Class folders with pictures of the generated shapes: train/, val/ and, if wanted, test/."""
    for part, each in (("train", train), ("val", val), ("test", test)):
        split = ShapesSplit("target", part, 0, range(8 * each))
        for i, sample in enumerate(split):
            if sample.label < classes:
                folder = root / part / f"class_{sample.label}"
                folder.mkdir(parents=True, exist_ok=True)
                split.load(i).save(folder / f"{i:03d}.png")
    return root
