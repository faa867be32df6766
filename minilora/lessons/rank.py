"""Why low rank suffices, seen twice; and a task for which it does not.

    python -m minilora.lessons.rank

1. Full fine-tuning is free to change every direction of W. What does it change? The singular
   values of its update dW = W_after - W_before: where a few hold most of |dW|^2, a low-rank
   update can take their place.
2. Accuracy of LoRA at r = 1, 2, 4 ... 32, on the same data with the same steps.
3. A layer whose wanted change is random noise of full rank: no r below the width will do, and by
   how much it must miss is known (Eckart and Young 1936): the singular values that are left out.

Low effective rank of what fine-tuning changes: Aghajanyan et al. 2020, arXiv:2012.13255; Hu et al.
2021, section 7.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora import LoRAConfig, LoRALinear, inject_lora
from minilora.data.generated.shapes import classification_splits
from minilora.lessons.loop import accuracy, base_model, tensors

TARGETS = ("q_proj", "v_proj")
RANKS = (1, 2, 4, 8, 16, 32)
WIDTH = 32  # of the layer in part 3


def train(model: nn.Module, x: Tensor, y: Tensor, lr: float, epochs: int) -> nn.Module:
    """AdamW on what is trainable, batches of 32, the rate falling to zero in a straight line."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    steps = epochs * -(-len(x) // 32)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(x)).split(32):
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model


def energy(update: Tensor, r: int) -> float:
    """Share of |dW|^2 that the r largest singular values hold."""
    squares = torch.linalg.svdvals(update).square()
    return float(squares[:r].sum() / squares.sum())


def spectrum_lines(before: nn.Module, after: nn.Module) -> list[str]:
    """Part 1: the shares, averaged over all layers of a name."""
    lines = ["share of |dW|^2 in the r largest singular values, full fine-tuning, mean over 4 blocks",
             "r         " + "".join(f"{r:>8}" for r in RANKS)]  # fmt: skip
    for target in (*TARGETS, "fc1"):
        layers = [name for name, _ in before.named_modules() if name.endswith("." + target)]
        updates = [after.get_submodule(n).weight - before.get_submodule(n).weight for n in layers]
        shares = [sum(energy(dW.detach(), r) for dW in updates) / len(updates) for r in RANKS]
        lines.append(f"{target:<10}" + "".join(f"{100 * share:>7.0f}%" for share in shares))
    noise = torch.randn_like(before.get_submodule(layers[0]).weight)
    lines.append("noise     " + "".join(f"{100 * energy(noise, r):>7.0f}%" for r in RANKS) + "   a random matrix")
    return lines


def full_rank_task(r: int, steps: int) -> tuple[float, float]:
    """Part 3: (error of LoRA after training, least error of any rank-r update), as shares of |D|^2.

    The wanted layer is W + D with D random; with random inputs the loss is |(s B A - D) x|^2, so
    what remains at the end is |s B A - D|^2, and that is at least the sum of D's smaller
    singular values squared.
    """
    torch.manual_seed(2)
    D = torch.randn(WIDTH, WIDTH)
    layer = LoRALinear(nn.Linear(WIDTH, WIDTH), r=r, lora_alpha=r)
    optimizer = torch.optim.Adam([layer.lora_A.weight, layer.lora_B.weight], lr=0.02)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        x = torch.randn(128, WIDTH)
        (layer(x) - layer.base_layer(x) - x @ D.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    left = float((layer.delta_weight() - D).square().sum() / D.square().sum())
    return left, 1 - energy(D, r)


def main(pictures: int = 1500, epochs: int = 8, ranks: tuple[int, ...] = RANKS, steps: int = 1500) -> None:
    splits = classification_splits(train=pictures)
    (x, y), (x_val, y_val) = tensors(splits.train), tensors(splits.val)
    base = base_model()
    full = train(copy.deepcopy(base), x, y, lr=5e-4, epochs=epochs)
    print("\n".join(spectrum_lines(base, full)))
    head = base_model()
    inject_lora(head, LoRAConfig(target_modules=(), modules_to_save=("head",)))
    score = accuracy(train(head, x, y, lr=0.03, epochs=epochs), x_val, y_val)
    print(f"\naccuracy on new shapes, {epochs} epochs\nhead only            {score:5.1f} %")
    for r in ranks:
        model = inject_lora(base_model(), LoRAConfig(r=r, lora_alpha=16, modules_to_save=("head",)))
        score = accuracy(train(model, x, y, lr=4e-3, epochs=epochs), x_val, y_val)
        print(f"LoRA on q, v, r {r:>2}   {score:5.1f} %")
    print(f"everything (full)    {accuracy(full, x_val, y_val):5.1f} %")
    print(f"\na layer that should change by a random {WIDTH} x {WIDTH} matrix D: what is left of |D|^2")
    print("r    after training    least possible")
    for r in ranks:
        left, least = full_rank_task(r, steps)
        print(f"{r:<3}{100 * left:>13.1f} %{100 * least:>15.1f} %")


if __name__ == "__main__":
    main()
