"""The three figures of the README, drawn from runs of the bundled nano ViT on generated shapes.

    python -m tests.benchmarks.figures            trains what they show (some minutes) and writes figures/*.png

curves: loss and accuracy of scratch, linear, LoRA and full fine-tuning; rank: accuracy against r; memory: bytes
of a training step of ViT-tiny, counted. The lessons `rank` and `cost` print the same numbers as text.
"""

from pathlib import Path

import matplotlib
import torch
from torch import nn
from torch.nn import functional as F

from minilora import LoRAConfig, inject_lora
from minilora.data.generated.shapes import classification_splits
from minilora.lessons.cost import MIB, counted, model_for
from minilora.lessons.loop import accuracy, base_model, tensors
from minilora.lessons.rank import RANKS
from reference_models import create_model

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

FOLDER = Path(__file__).parent / "figures"
EPOCHS, SEEDS = 8, (0, 1, 2)
# learning rates: the best of three on validation pictures of another seed (nano_table)
RATES = {"scratch": 1e-3, "linear": 1e-1, "LoRA": 5e-3, "full": 5e-4}
COLOURS = {"scratch": "#999999", "linear": "#e69f00", "LoRA": "#0072b2", "full": "#d55e00"}


def model_of(mode: str, r: int = 8) -> nn.Module:
    """The nano ViT as `mode` trains it."""
    if mode == "scratch":
        return create_model("vit-nano-patch8-48", num_classes=8)
    if mode == "full":
        return base_model()
    targets = ("q_proj", "v_proj") if mode == "LoRA" else ()
    return inject_lora(base_model(), LoRAConfig(r=r, lora_alpha=16, target_modules=targets, modules_to_save=("head",)))


def trained(mode: str, seed: int, data, r: int = 8) -> list[tuple[float, float]]:
    """(mean training loss, validation accuracy) of every epoch; AdamW, batches of 32, a falling rate."""
    (x, y), (x_val, y_val) = data
    torch.manual_seed(seed)
    model = model_of(mode, r)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATES[mode])
    steps, rows = EPOCHS * -(-len(x) // 32), []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(EPOCHS):
        model.train()
        losses = []
        for batch in torch.randperm(len(x)).split(32):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        rows.append((sum(losses) / len(losses), accuracy(model, x_val, y_val)))
    return rows


def curves(found: dict[str, torch.Tensor]) -> None:
    """found: {mode: (seeds, epochs, 2)}."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for mode, rows in found.items():
        epochs, mean = range(1, EPOCHS + 1), rows.mean(0)
        for axis, column in ((left, 0), (right, 1)):
            axis.plot(
                epochs, mean[:, column], color=COLOURS[mode], label=f"{mode} {mean[-1, column]:.3g}", marker="o", ms=3
            )
            low, high = rows[..., column].min(0)[0], rows[..., column].max(0)[0]
            axis.fill_between(epochs, low, high, color=COLOURS[mode], alpha=0.15, lw=0)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="validation accuracy, %")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle("Eight new shapes, 1,500 pictures: what each way of training makes of the nano ViT", fontsize=10)
    figure.savefig(FOLDER / "curves.png", dpi=110)


def rank(scores: dict[int, list[float]], linear: float, full: float) -> None:
    """scores: {r: accuracy of each seed}."""
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    mean = [sum(scores[r]) / len(scores[r]) for r in RANKS]
    spread = [[m - min(scores[r]) for m, r in zip(mean, RANKS, strict=True)]]
    spread += [[max(scores[r]) - m for m, r in zip(mean, RANKS, strict=True)]]
    axis.errorbar(RANKS, mean, yerr=spread, color=COLOURS["LoRA"], marker="o", ms=4, capsize=3, label="LoRA on q and v")
    for name, value in (("full", full), ("linear", linear)):
        axis.axhline(value, color=COLOURS[name], ls="--", lw=1, label=f"{name} {value:.1f} %")
    axis.set(xscale="log", xlabel="rank r", ylabel="validation accuracy, %")
    axis.set_xticks(RANKS, map(str, RANKS))
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(FOLDER / "rank.png", dpi=110)


def memory() -> None:
    """Bytes of one step of ViT-tiny, batch 8, stacked."""
    x, y = torch.randn(8, 3, 224, 224), torch.arange(8) % 10
    parts = {"weights": "#bbbbbb", "gradients": "#e69f00", "AdamW": "#d55e00", "activations": "#56b4e9"}
    figure, axis = plt.subplots(figsize=(5.6, 2.4), layout="constrained")
    for row, mode in enumerate(("full", "lora", "linear")):
        model, start = model_for(mode, "vit-tiny-patch16-224"), 0.0
        sizes = counted(model, lambda model=model: F.cross_entropy(model(x), y))
        for part, colour in parts.items():
            axis.barh(row, sizes[part] / MIB, left=start, color=colour, label=part if row == 0 else None)
            start += sizes[part] / MIB
        axis.text(start + 4, row, f"{start:.0f} MiB", va="center", fontsize=8)
    axis.set_yticks(range(3), ("full", "LoRA", "linear"))
    axis.set(xlabel="MiB in a training step of ViT-tiny, batch 8, float32", xlim=(0, 350))
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.45, 1.22))
    figure.savefig(FOLDER / "memory.png", dpi=110)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    splits = classification_splits(train=1500)
    data = tensors(splits.train), tensors(splits.val)
    memory()
    found = {mode: torch.tensor([trained(mode, seed, data) for seed in SEEDS]) for mode in RATES}
    curves(found)
    ends = {mode: rows[:, -1, 1].tolist() for mode, rows in found.items()}
    scores = {r: ends["LoRA"] if r == 8 else [trained("LoRA", s, data, r)[-1][1] for s in SEEDS] for r in RANKS}
    rank(scores, sum(ends["linear"]) / len(SEEDS), sum(ends["full"]) / len(SEEDS))
    for name, values in (*ends.items(), *((f"LoRA r {r}", v) for r, v in scores.items())):
        print(f"{name:<10}" + " ".join(f"{value:.1f}" for value in values))


if __name__ == "__main__":
    main()
