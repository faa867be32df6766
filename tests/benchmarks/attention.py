"""The two forms of attention, torch's fused one and the one written out, by dtype, tokens and
whether a gradient is wanted: the table behind `reference_models.processor.written_out_pays`.

    python -m tests.benchmarks.attention --threads 1 --save

q, k and v are the transposed views that the projections give; gradients are of all three.
"""

import torch

from reference_models.layers import Attention
from tests.benchmarks.common import interleaved, parser, prepare, ratio, report, told

SHAPES = {  # name: (B, T, heads, width of a head)
    "vit-nano, 64 pictures": (64, 37, 4, 32),
    "bert-nano, 64 questions": (64, 16, 4, 32),
    "ViT-B/32, 16 pictures": (16, 50, 12, 64),
    "bert-base, 8 x 64": (8, 64, 12, 64),
    "bert-base, 4 x 128": (4, 128, 12, 64),
    "vit-tiny, 16 pictures": (16, 197, 3, 64),
    "vit-base, 4 pictures": (4, 197, 12, 64),
    "ViT-L/14, 2 pictures": (2, 257, 16, 64),
    "vit-base at 384, 1 picture": (1, 577, 12, 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def steps(shape: tuple, dtype: torch.dtype) -> dict:
    """The four candidates of one row: each form with and without its gradients."""
    B, T, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(B, T, heads, width, generator=generator).to(dtype) for _ in range(3)]
    q, k, v = (x.transpose(1, 2).requires_grad_(True) for x in inputs)
    # as the gradient of out_proj's input comes
    above = torch.randn(B, T, heads, width, generator=generator).to(dtype).transpose(1, 2)

    layer = Attention(heads * width, heads)

    def forward(written):
        layer.fused = lambda *_: not written
        return layer.attend(q, k, v, None)

    def value(written):
        with torch.no_grad():
            forward(written)

    return {
        "fused": lambda: value(False),
        "written out": lambda: value(True),
        "fused, gradient": lambda: torch.autograd.grad(forward(False), (q, k, v), above),
        "written out, gradient": lambda: torch.autograd.grad(forward(True), (q, k, v), above),
    }


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    arguments = flags.parse_args()
    header, rows, raw = f"{prepare(arguments)}, {arguments.rounds} rounds", [], {}
    for dtype in arguments.dtypes:
        for name, shape in SHAPES.items():
            seconds = raw[f"{dtype} {name}"] = interleaved(steps(shape, DTYPES[dtype]), arguments.rounds)
            row = {"dtype": dtype, "what": name, "tokens": shape[1]}
            for suffix in ("", ", gradient"):
                fused, written = seconds[f"fused{suffix}"], seconds[f"written out{suffix}"]
                middle = 1e3 * sorted(fused)[len(fused) // 2]
                row[f"fused{suffix} ms"] = f"{middle:.2f}"
                row[f"fused / written out{suffix}"] = told(ratio(fused, written))
            rows.append(row)
    report("attention", header, rows, arguments.save, raw)


if __name__ == "__main__":
    main()
