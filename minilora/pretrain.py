"""Make the bundled nano weights: small models trained from nothing on the procedural source tasks.

    python -m minilora.pretrain vit-nano                 # the official weights, some minutes on two cores
    python -m minilora.pretrain vit-nano --steps 20 --output /tmp/nano      # a quick look

Each model is one function below; what they share is the loop `fit`. Source tasks differ from the demonstrations'
(other shapes, other colours), so that fine-tuning has something to adapt.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.adapter import atomic_write
from minilora.data.loader import collate, in_order
from minilora.data.shapes import ShapesSplit, task_classes
from minilora.data.transforms import Normalise
from reference_models import create_model, save_pretrained

WEIGHTS = Path(__file__).parents[1] / "reference_models" / "weights"


@dataclass(frozen=True)
class Plan:
    """How long and how fast: AdamW with linear warm-up and a cosine to zero."""

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    seed: int = 0


def fit(model: nn.Module, loss_of: Callable[[range], Tensor], plan: Plan) -> None:
    """Train all of `model`. `loss_of(numbers)` makes the loss of the samples with these numbers; none comes twice."""
    optimizer = torch.optim.AdamW(model.parameters(), plan.lr, weight_decay=plan.weight_decay, fused=True)
    warm = max(1, round(plan.warmup * plan.steps))

    def factor(step: int) -> float:
        done = (step - warm) / max(1, plan.steps - warm)
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    start, recent = time.time(), None
    for step in range(plan.steps):
        loss = loss_of(range(step * plan.batch_size, (step + 1) * plan.batch_size))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = loss.item() if recent is None else 0.95 * recent + 0.05 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == plan.steps:
            speed = (step + 1) * plan.batch_size / (time.time() - start)
            print(f"step {step + 1}/{plan.steps} loss {recent:.4f} samples/s {speed:.0f}", flush=True)
    model.eval()


def batch_of(split: ShapesSplit, normalise: Normalise, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) float32 pictures and (B,) labels of the shapes with these numbers."""
    items = [{"image": torch.from_numpy(split.pixels(i)), "label": split[i].label} for i in indices]
    batch = collate(items)
    return normalise(batch["image"].permute(0, 3, 1, 2)), batch["label"]


@torch.no_grad()
def accuracy(model: nn.Module, split: ShapesSplit, normalise: Normalise) -> float:
    """Share of right answers, in percent."""
    right = 0
    for indices in in_order(len(split), 100):
        images, labels = batch_of(split, normalise, indices)
        right += int((model(images).argmax(1) == labels).sum())
    return 100 * right / len(split)


def vit_nano(plan: Plan) -> tuple[nn.Module, dict]:
    """48-way colour x shape. 829,104 parameters: 48 pixels, patches of 8, width 128, 4 blocks."""
    model = create_model("vit-nano-patch8-48", num_classes=48)
    normalise = Normalise(model.preprocess)
    train = ShapesSplit("source", "train", plan.seed, range(plan.steps * plan.batch_size))

    def loss_of(numbers: range) -> Tensor:
        images, labels = batch_of(train, normalise, numbers)
        return nn.functional.cross_entropy(model(images), labels)

    fit(model, loss_of, plan)
    model.labels = task_classes("source")
    score = accuracy(model, ShapesSplit("source", "val", plan.seed, range(1920)), normalise)
    return model, {"task": "48 classes: 6 colours x 8 shapes", "accuracy": round(score, 2)}


RECIPES: dict[str, tuple[Callable[[Plan], tuple[nn.Module, dict]], Plan, str]] = {
    "vit-nano": (vit_nano, Plan(steps=1800, lr=1.5e-3), "vit-nano-patch8-48"),
}


def pretrain(name: str, output: Path | None = None, steps: int | None = None) -> dict:
    """Train the nano model `name`, write config.json and model.safetensors to `output`; returns the record."""
    recipe, plan, folder = RECIPES[name]
    plan = replace(plan, steps=steps or plan.steps)
    output = output or WEIGHTS / folder
    torch.manual_seed(plan.seed)
    start = time.time()
    model, record = recipe(plan)
    record |= {
        "samples": plan.steps * plan.batch_size,
        "seconds": round(time.time() - start),
        "seed": plan.seed,
    }
    save_pretrained(model, output)
    config = json.loads((output / "config.json").read_text())
    content = json.dumps(config | {"pretraining": record}, indent=2) + "\n"
    atomic_write(output / "config.json", content.encode())
    print(f"{name}: {json.dumps(record)} -> {output}")
    return record


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minilora.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(RECIPES), help="the model to make")
    parser.add_argument(
        "--output", type=Path, help="folder to write to (default: where the bundled weights lie)"
    )
    parser.add_argument("--steps", type=int, help="train for fewer steps, to try it out")
    options = parser.parse_args(argv)
    pretrain(options.name, options.output, options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
