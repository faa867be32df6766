"""Merging: what it writes, what it keeps, two adapters on one base, and what rounding does.

python -m minilora.lessons.merge
"""

import copy

import torch
from torch import Tensor, nn

from minilora import LoRAConfig, disable_lora, inject_lora, merge_lora
from reference_models import create_model

NAME, CLASSES = "vit-nano-patch8-48", 8


def adapted(base: nn.Module, seed: int) -> nn.Module:
    """A copy of `base` with an adapter that does something: B is random."""
    torch.manual_seed(seed)
    config = LoRAConfig(r=4, target_modules=("q_proj", "v_proj"), init_lora_weights=False)
    return inject_lora(copy.deepcopy(base), config).eval()


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, in standard deviations of b."""
    return float((a - b).abs().max() / b.std())


def half_precision(weight: Tensor, update: Tensor, times: int) -> tuple[float, float]:
    """What is left in float16 of an update that is added at once, and of one added in
    `times` small steps.

    float16 has 10 bits behind the leading one: a step below 1 / 2048 of an entry
    leaves it as it was.
    """
    exact = weight + update
    at_once = (weight.half().float() + update).half().float()
    steps = weight.half()
    for _ in range(times):
        steps = steps + (update / times).half()

    def kept(result: Tensor) -> float:
        moved = result - weight.half().float()
        return float((moved * (exact - weight)).sum() / (exact - weight).square().sum())

    return kept(at_once), kept(steps.float())


@torch.no_grad()
def facts() -> dict[str, float]:
    """The numbers of the lesson, by name."""
    torch.manual_seed(0)
    # frozen, as in `one`: some versions of torch multiply otherwise where a gradient may be wanted
    base = create_model(NAME, num_classes=CLASSES).eval().requires_grad_(False)
    x = torch.randn(4, 3, 48, 48)
    one, two = adapted(base, 1), adapted(base, 2)
    found = {"adapter one moves the logits by": distance(one(x), base(x))}
    with disable_lora(one):
        found["switched off, they are the base's, up to"] = distance(one(x), base(x))
    wanted = one(x)
    weight = one.blocks[0].attn.q_proj.base_layer.weight
    before = weight.clone()
    plain = merge_lora(copy.deepcopy(one))
    found["merged, they are the adapter's, up to"] = distance(plain(x), wanted)
    found["and W of the unmerged model has moved by"] = float((weight - before).abs().max())
    found["a second merge of the merged model changes them by"] = distance(merge_lora(plain)(x), wanted)
    found["adapter two on the same base moves the logits by"] = distance(two(x), base(x))
    both = copy.deepcopy(base)
    deltas = {name: one.get_submodule(name).delta_weight() + two.get_submodule(name).delta_weight()
              for name, module in one.named_modules() if hasattr(module, "lora_A")}  # fmt: skip
    for name, delta in deltas.items():
        both.get_submodule(name).weight += delta
    found["both updates added to one W move them by"] = distance(both(x), base(x))
    small = one.blocks[0].attn.q_proj.delta_weight() * 0.002
    at_once, in_steps = half_precision(before, small, times=100)
    found["float16, a small update added at once: kept, %"] = 100 * at_once
    found["float16, the same in 100 steps: kept, %"] = 100 * in_steps
    return found


def main() -> None:
    for words, number in facts().items():
        print(f"{words:<58}{number:>10.4g}")
    print("\nDifferences of logits are in standard deviations. merge_lora makes new nn.Linear layers and leaves\n"
          "W as it was, so that a merge can be undone by loading the base again: subtracting s B A would not\n"
          "bring W back to the bit. The last line is why adapters are trained in float32 and merged once:\n"
          "in half precision most small steps are rounded away, each for itself.")  # fmt: skip


if __name__ == "__main__":
    main()
