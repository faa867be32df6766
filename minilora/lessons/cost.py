"""What a training step costs with full fine-tuning, LoRA and the head alone: counted, and measured.

    python -m minilora.lessons.cost

Bytes: weights W, gradients and AdamW's two moments are counted from the parameters; activations are
what autograd keeps for backward (torch.autograd.graph.saved_tensors_hooks), each storage once.
Arithmetic: multiplications and additions of the matrix products, by torch.utils.flop_counter.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from minilora import LoRAConfig, inject_lora, speed
from reference_models import create_model

MIB = 2**20
LORA = LoRAConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj"), modules_to_save=("head",))
HEAD = LoRAConfig(target_modules=(), modules_to_save=("head",))


def model_for(mode: str, name: str) -> nn.Module:
    """The model, trained as `mode` says: full, lora or linear."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10).train()
    return model if mode == "full" else inject_lora(model, LORA if mode == "lora" else HEAD)


def counted(model: nn.Module, step: Callable[[], Tensor]) -> dict[str, float]:
    """Bytes by kind and operations of one step."""
    weights = list(model.parameters())
    trained = [p for p in weights if p.requires_grad]
    own = {p.untyped_storage().data_ptr() for p in weights}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step()
    speed.enabled = False  # the counter knows torch's own products, not oneDNN's
    try:
        with FlopCounterMode(display=False) as forward:
            loss = step()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    finally:
        speed.enabled = True
    gradients = sum(p.grad.nbytes for p in trained)
    return {"weights": sum(p.nbytes for p in weights), "gradients": gradients, "AdamW": 2 * gradients,
            "activations": sum(kept.values()), "forward": forward.get_total_flops(),
            "backward": backward.get_total_flops()}  # fmt: skip


def seconds(step: Callable[[], Tensor], model: nn.Module, times: int) -> float:
    """Median time of forward, backward and AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        step().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def main(name: str = "vit-tiny-patch16-224", batch: int = 8, times: int = 5) -> dict[str, dict[str, float]]:
    config = create_model(name).config
    x, y = torch.randn(batch, 3, config.image_size, config.image_size), torch.arange(batch) % 10
    print(f"{name}, batch {batch}, float32, one training step\n")
    print(f"{'':<10}{'MiB: weights':>14}{'gradients':>11}{'AdamW':>8}{'activations':>13}{'all':>8}"
          f"{'GFLOP: fwd':>13}{'bwd':>7}{'ms':>8}")  # fmt: skip
    table = {}
    for mode in ("full", "lora", "linear"):
        model = model_for(mode, name)

        def step(model: nn.Module = model) -> Tensor:
            return F.cross_entropy(model(x), y)

        row = counted(model, step)
        row["ms"] = 1000 * seconds(step, model, times)
        sizes = [row[key] / MIB for key in ("weights", "gradients", "AdamW", "activations")]
        print(
            f"{mode:<10}{sizes[0]:>14.1f}{sizes[1]:>11.2f}{sizes[2]:>8.2f}{sizes[3]:>13.1f}{sum(sizes):>8.1f}"
            # fmt: skip
            f"{row['forward'] / 1e9:>13.1f}{row['backward'] / 1e9:>7.1f}{row['ms']:>8.0f}"
        )
        table[mode] = row
    arithmetic = {mode: row["forward"] + row["backward"] for mode, row in table.items()}
    share = 100 * table["lora"]["gradients"] / table["full"]["gradients"]
    most, measured = arithmetic["full"] / arithmetic["lora"], table["full"]["ms"] / table["lora"]["ms"]
    kept = 100 * table["lora"]["activations"] / table["full"]["activations"]
    print(f"""
Gradients and AdamW's moments fall to {share:.1f} %: that is LoRA's gain in memory.
Activations fall to {kept:.0f} % only: dL/dx has to pass every frozen layer above the first adapter.
A linear layer costs three products of one size: y = x W^T, then dx = g W and dW = g^T x backward.
LoRA saves the last one alone: a step can be {most:.2f} times as fast at best; measured: {measured:.2f}.
The head alone needs no backward through the encoder at all.""")
    return table


if __name__ == "__main__":
    main()
