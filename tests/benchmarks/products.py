"""Matrix products by library and form: the tables behind `minilora.speed.gemm` and
`minilora.fused.merging_pays`.

    python -m tests.benchmarks.products library --threads 1 --save     # MKL beside oneDNN, float32
    python -m tests.benchmarks.products narrow --threads 1 --save      # x A^T with few rows in A
    python -m tests.benchmarks.products lora --threads 1 --save        # one layer, forward and backward

Between two rounds 24 MB are written, as the rest of a model would, so that nothing is found in a cache.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minilora import fused, speed
from minilora.speed import gemm
from tests.benchmarks.common import interleaved, parser, prepare, ratio, report, told

FEATURES = ((128, 128), (192, 192), (192, 768), (768, 192), (768, 768), (768, 3072), (768, 10))
ROWS = (1, 8, 32, 64, 128, 256, 512, 3152)
# (rows, in, out): vit-nano batch 32, vit-tiny batch 16 and 64, vit-base batch 8
LAYERS = ((1184, 128, 512), (3152, 192, 192), (3152, 192, 768), (3152, 768, 192), (12608, 192, 192))
LAYERS += ((12608, 192, 768), (12608, 768, 192), (1576, 768, 768), (1576, 768, 3072), (1576, 3072, 768))
RANKS = (4, 8, 16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OTHERS = torch.zeros(6_000_000)


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def repeated(function, arguments: tuple, times: int = 1):
    return lambda: [function(*arguments) for _ in range(times)]


def library(rounds: int) -> list[dict]:
    """MKL's time over oneDNN's for x W^T, g W and g^T x."""
    rows = []
    for d_in, d_out in FEATURES:
        row = {"in -> out": f"{d_in} -> {d_out}"}
        for n in ROWS:
            x, W, g = torch.randn(n, d_in), torch.randn(d_out, d_in), torch.randn(n, d_out)
            pairs = ((x, W), (g, W.T), (g.T, x.T))
            steps = {
                f"{f.__name__} {i}": repeated(f, pair, max(1, int(2e7 / (n * d_in * d_out))))
                for i, pair in enumerate(pairs)
                for f in (F.linear, onednn)
            }
            seconds = interleaved(steps, rounds)
            values = (ratio(seconds[f"linear {i}"], seconds[f"onednn {i}"])[0] for i in range(3))
            row[f"{n} rows"] = " ".join(f"{value:.2f}" for value in values)
        rows.append(row)
    return rows


def narrow(rounds: int) -> list[dict]:
    """x A^T three ways, as a share of the whole x W^T of the layer."""
    rows = []
    for name, dtype in DTYPES.items():
        for n, d_in, d_out in LAYERS:
            for r in RANKS:
                x, W, A = (torch.randn(size, d_in).to(dtype) for size in (n, d_out, r))
                forms = {"x A^T": repeated(F.linear, (x, A)), "A x^T": repeated(torch.matmul, (A, x.T))}
                forms["oneDNN"] = repeated(onednn, (x, A))
                seconds = interleaved({"whole": repeated(gemm.product, (x, W))} | forms, rounds)
                row = {"dtype": name, "rows, in, out": f"{n}, {d_in}, {d_out}", "r": r}
                rows.append(row | {form: f"{ratio(seconds[form], seconds['whole'])[0]:.3f}" for form in forms})
    return rows


def lora(rounds: int) -> list[dict]:
    """What the adapter costs beside the plain frozen layer, y and dx: the readable form, s h B^T added,
    and W' = W + s B A."""
    rows = []
    for name, dtype in DTYPES.items():
        for n, d_in, d_out in LAYERS:
            for r in RANKS:
                x, g = torch.randn(n, d_in).to(dtype).requires_grad_(), torch.randn(n, d_out).to(dtype)
                W, b = torch.randn(d_out, d_in).to(dtype) / d_in**0.5, torch.randn(d_out).to(dtype)
                A, B = torch.randn(r, d_in).requires_grad_(), torch.randn(d_out, r).requires_grad_()

                def readable(x=x, W=W, b=b, A=A, B=B, g=g):
                    y = F.linear(x, W, b) + 2.0 * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
                    torch.autograd.grad(y, (x, A, B), g)

                def form(merged, x=x, W=W, b=b, A=A, B=B, g=g):
                    fused.merging_pays = lambda *_: merged
                    torch.autograd.grad(fused.lora_linear(x, x, W, b, A, B, 2.0), (x, A, B), g)

                def plain(x=x, W=W, b=b, g=g):
                    gemm.product(x.detach(), W, b)
                    gemm.product(g, W.T)

                steps = {"plain": plain, "readable": readable, "added": lambda f=form: f(False)}
                if name == "fp32":
                    steps["merged"] = lambda f=form: f(True)
                rule = fused.merging_pays
                try:
                    seconds = interleaved({key: flushed(step) for key, step in steps.items()}, rounds)
                finally:
                    fused.merging_pays = rule
                row = {"dtype": name, "rows, in, out": f"{n}, {d_in}, {d_out}", "r": r}
                row |= {key: told(ratio(seconds[key], seconds["plain"])) for key in ("readable", "added")}
                row["merged"] = told(ratio(seconds["merged"], seconds["plain"])) if "merged" in steps else ""
                row["rule"] = "merged" if rule(x.detach(), W) else "added"
                rows.append(row)
    return rows


def flushed(step):
    def run():
        OTHERS.add_(1)
        step()

    return run


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("table", choices=("library", "narrow", "lora"))
    arguments = flags.parse_args()
    header = f"{prepare(arguments)}, {arguments.rounds} rounds; oneDNN {'on' if gemm.onednn else 'off'}"
    assert speed.enabled
    tables = {"library": library, "narrow": narrow, "lora": lora}
    with torch.set_grad_enabled(arguments.table == "lora"):
        rows = tables[arguments.table](arguments.rounds)
    report(f"products_{arguments.table}", header, rows, arguments.save)


if __name__ == "__main__":
    main()
