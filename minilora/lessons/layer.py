"""One nn.Linear and one LoRALinear on the same numbers: six facts, each computed and printed.

python -m minilora.lessons.layer

y = W x + b + s B A x      W (out, in) frozen, A (r, in), B (out, r), s = lora_alpha / r
"""

import torch
from torch import nn
from torch.nn import functional as F

from minilora import LoRALinear

IN, OUT, RANK, ALPHA = 12, 8, 2, 4.0


def size(tensor: torch.Tensor | None) -> float:
    """The largest entry, without its sign."""
    return 0.0 if tensor is None else tensor.detach().abs().max().item()


def facts() -> list[tuple[str, str]]:
    """(claim, the numbers that show it), in float64 so that rounding does not hide anything."""
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT).double()
    W, b = linear.weight.detach().clone(), linear.bias.detach().clone()
    lora = LoRALinear(linear, r=RANK, lora_alpha=ALPHA)
    A, B = lora.lora_A.weight, lora.lora_B.weight
    x, target = torch.randn(5, IN).double(), torch.randn(5, OUT).double()
    found = []

    def loss() -> torch.Tensor:
        return 0.5 * (lora(x) - target).square().sum()

    found.append(("At first LoRALinear is the layer that it wraps, because B = 0.",
                 f"largest |difference| = {size(lora(x) - F.linear(x, W, b)):g}"))  # fmt: skip
    loss().backward()
    found.append(
        (
            "Yet it learns: dL/dB = s g^T (x A^T) is not zero; only dL/dA = s (g B)^T x is, for one step.",
            # fmt: skip
            f"largest |dL/dB| = {size(B.grad):.3f}, largest |dL/dA| = {size(A.grad):g}",
        )
    )
    found.append(("W gets no gradient, and so no optimizer memory either.", f"W.grad is {lora.base_layer.weight.grad}"))
    nn.init.zeros_(A)
    A.grad = B.grad = None
    loss().backward()
    found.append(
        (
            "If A were zero as well, both gradients would be zero, and nothing would ever be learned.",
            # fmt: skip
            f"largest |dL/dB| = {size(B.grad):g}, largest |dL/dA| = {size(A.grad):g}",
        )
    )
    nn.init.normal_(A)
    nn.init.normal_(B)
    update = lora.delta_weight()  # (out, in)
    values = ", ".join(f"{value:.2f}" for value in torch.linalg.svdvals(update).clamp_min(1e-12)[:4])
    found.append(
        (
            f"The update s B A is a whole ({OUT}, {IN}) matrix, but of rank {RANK}: A and B hold "
            f"{RANK * (IN + OUT)} numbers, W holds {IN * OUT}.",
            # fmt: skip
            f"singular values {values}, ...; rank {int(torch.linalg.matrix_rank(update))}",
        )
    )
    dense = F.linear(x, W + ALPHA / RANK * B @ A, b)
    found.append(
        (
            "The layer is the dense layer with the weight W + s B A: that is what merging writes.",
            f"largest |difference| = {size(lora(x) - dense):.1e}, merged() {size(lora.merged()(x) - dense):.1e}",
        )
    )
    return found


def main() -> None:
    print(f"in = {IN}, out = {OUT}, r = {RANK}, lora_alpha = {ALPHA:g}, so s = {ALPHA / RANK:g}\n")
    for number, (claim, numbers) in enumerate(facts(), 1):
        print(f"{number}. {claim}\n   {numbers}\n")
    print(
        "Why is B zero and not A? One of them has to be, so that training starts from the base model\n"
        "itself, and one must not be (fact 4). A random and B zero is the paper's choice: A picks r random\n"
        # fmt: skip
        "directions of x, scaled as nn.Linear's own, and the first steps decide what to do with them."
    )


if __name__ == "__main__":
    main()
