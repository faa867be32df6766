"""One LoRA step on a 3x3 layer, every product written out, by hand and by the code.

    python -m minilora.lessons.equation

    y = W x + s B A x,  r = 1, lora_alpha = 2, so s = 2;   loss L = |y - t|^2 / 2,  so dL/dy = y - t

One side is plain Python arithmetic on lists, the other LoRALinear and autograd. All numbers are
short sums of powers of two, so the two must agree in every digit, not nearly.
"""

import torch
from torch import nn

from minilora.lora import LoRALinear

W = [[1.0, 0.0, 2.0], [0.0, 1.0, -1.0], [3.0, 0.0, 1.0]]  # (3, 3) frozen
A = [0.5, -1.0, 1.5]  # (1, 3) one row, because r = 1
B = [0.5, 0.0, -0.25]  # (3, 1) one column; zero before the first step, here some steps later
S = 2.0  # s = lora_alpha / r
X = [2.0, 1.0, 1.0]  # the input
T = [5.0, 1.0, 6.5]  # the target
LR = 0.125  # learning rate of the one step of gradient descent


def dot(u: list[float], v: list[float]) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True))


def by_hand() -> dict[str, list[float]]:
    """Forward, backward and one step with the formulas of minilora/fused.py, entry by entry."""
    base = [dot(row, X) for row in W]
    h = dot(A, X)
    y = [w + S * b * h for w, b in zip(base, B, strict=True)]
    g = [a - t for a, t in zip(y, T, strict=True)]
    gB = dot(g, B)
    dA = [S * gB * x for x in X]
    dB = [S * gi * h for gi in g]
    dx = [dot(g, [row[j] for row in W]) + S * gB * A[j] for j in range(3)]
    new_A = [a - LR * d for a, d in zip(A, dA, strict=True)]
    new_B = [b - LR * d for b, d in zip(B, dB, strict=True)]
    new_h = dot(new_A, X)
    new_y = [w + S * b * new_h for w, b in zip(base, new_B, strict=True)]
    backward = {"g": g, "gB": [gB], "dB": dB, "dA": dA, "dx": dx}
    return {"Wx": base, "h": [h], "y": y} | backward | {"A'": new_A, "B'": new_B, "y'": new_y}


def by_code() -> dict[str, list[float]]:
    """The same quantities from LoRALinear, autograd and torch's SGD."""
    layer = LoRALinear(nn.Linear(3, 3, bias=False), r=1, lora_alpha=2)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor(W))
        layer.lora_A.weight.copy_(torch.tensor([A]))
        layer.lora_B.weight.copy_(torch.tensor(B)[:, None])
    x, target = torch.tensor(X, requires_grad=True), torch.tensor(T)
    y = layer(x)
    y.retain_grad()
    (0.5 * (y - target).square().sum()).backward()
    a, b = layer.lora_A.weight, layer.lora_B.weight
    result = {"Wx": layer.base_layer(x), "h": layer.lora_A(x), "y": y, "g": y.grad, "gB": y.grad @ b}
    result |= {"dB": b.grad, "dA": a.grad, "dx": x.grad}
    result = {name: value.detach().clone() for name, value in result.items()}
    torch.optim.SGD([a, b], lr=LR).step()
    result |= {"A'": a.detach(), "B'": b.detach(), "y'": layer(x).detach()}
    return {name: value.flatten().tolist() for name, value in result.items()}


def products(weights: list[float], values: list[float]) -> str:
    """ "1*1 + 0*2 + 2*3" """
    return " + ".join(f"{w:g}*{v:g}" for w, v in zip(weights, values, strict=True))


def each(form: str, *columns: list[float]) -> list[str]:
    return [form.format(*row) for row in zip(*columns, strict=True)]


def working(n: dict[str, list[float]]) -> list[tuple[str, str, list[str]]]:
    """(name, formula, the arithmetic of each entry) of every line of the table."""
    h, gB, g, new_h = n["h"] * 3, n["gB"] * 3, n["g"], [dot(n["A'"], X)] * 3
    back = [products([row[j] for row in W], g) for j in range(3)]
    return [
        ("Wx", "W x", [products(row, X) for row in W]),
        ("h", "A x", [products(A, X)]),
        ("y", "W x + s B h", each("{:g} + 2*{:g}*{:g}", n["Wx"], B, h)),
        ("g", "dL/dy = y - t", each("{:g} - {:g}", n["y"], T)),
        ("gB", "B^T g", [products(B, g)]),
        ("dB", "dL/dB = s g h", each("2*{:g}*{:g}", g, h)),
        ("dA", "dL/dA = s gB x", each("2*{:g}*{:g}", gB, X)),
        ("dx", "W^T g + s gB A", each("{} + 2*{:g}*{:g}", back, gB, A)),
        ("A'", "A - lr dA", each("{:g} - 0.125*{:g}", A, n["dA"])),
        ("B'", "B - lr dB", each("{:g} - 0.125*{:g}", B, n["dB"])),
        ("y'", "W x + s B' h'", each("{:g} + 2*{:g}*{:g}", n["Wx"], n["B'"], new_h)),
    ]


def table() -> str:
    hand, code = by_hand(), by_code()
    lines = ["One LoRA step on a 3x3 layer: y = W x + s B A x, loss |y - t|^2 / 2, r = 1, lora_alpha = 2, s = 2", ""]
    for i in range(3):
        row = "[" + " ".join(f"{w:4g}" for w in W[i]) + "]"
        vectors = (row, f"[{B[i]:5g}]", f"[{X[i]:g}]", f"[{T[i]:3g}]")
        names = ("W =", "B =", "x =", "t =") if i == 1 else ("   ",) * 4
        lines.append("  " + "   ".join(each("{} {}", names, vectors)))
    lines += [f"  A = [{' '.join(f'{a:4g}' for a in A)}]   learning rate {LR:g}; W stays as it is", ""]
    titles = {"Wx": "forward", "g": "backward", "A'": "the step, and the forward after it"}
    for name, formula, entries in working(hand):
        if name in titles:
            lines.append(f"{titles[name]:<37}{'by hand':>38}{'by the code':>14}")
        for i, (entry, mine, theirs) in enumerate(zip(entries, hand[name], code[name], strict=True)):
            left = f"{name:>3} = {formula}" if i == 0 else ""
            mark = "=" if mine == theirs else "DIFFERENT"
            lines.append(f"{left:<21}{entry:<39}= {mine:>12.10g} {mark} {theirs:>11.10g}")
    before, after = (sum(0.5 * (y - t) ** 2 for y, t in zip(hand[k], T, strict=True)) for k in ("y", "y'"))
    verdict = "agree in every digit" if hand == code else "DIFFER"
    return "\n".join([*lines, "", f"Hand and code {verdict}. The step takes the loss from {before:g} to {after:g}."])


if __name__ == "__main__":
    print(table())
