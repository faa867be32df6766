"""What an update dW looks like from inside: its size, its singular values, and whether it
points where W points.

For each adapted layer with weight W (out, in) and update dW = U diag(s) V^T:
    relative norm       |dW| / |W| in the Frobenius norm
    effective rank      exp(-sum p_i log p_i) with p_i = s_i / sum s: between 1 and the rank;
                        4 equal values give 4
    overlap (rows)      phi = |V_W^T V_dW|^2 / k in 0..1: the leading k directions of the input
                        that W reads, against those that dW reads; (columns) the same for the
                        output directions. k directions drawn at random in n dimensions have
                        phi = k / n, so that is the number to compare with
    amplification       |dW| / |U^T W V|: how much larger dW is than what W itself does in the
                        k directions of dW

Hu et al. 2021, arXiv:2106.09685, section 7 and its equation 4; effective rank: Roy & Vetterli 2007.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.inject import lora_layers
from minilora.report.page import Table
from minilora.report.plots import load_pyplot, plain, save_figure
from minilora.report.tables import text_table
from minilora.textfiles import printable

HOW_TO_READ = (
    "How to read this: |dW|/|W| says how far training moved a layer; a few percent is usual, and a layer near 0 could "
    "have been left out. The singular values are the strengths of the update's independent directions: LoRA has at "
    "most r of them, full fine-tuning has all. The effective rank says how many of them count; far below r means a "
    "smaller r would do, close to r means that the update would like more. The overlap compares the update's strongest "
    "directions with those of W: near the value for random directions means that training added something W hardly "
    "did, near 1 means that it only turned up what was there. The amplification factor says by how much the update's "
    "own directions were made stronger than W had them; Hu et al. found factors of about 20 in small layers."
)


@dataclass
class LayerSpectrum:
    """The numbers of one layer. `random_overlap`: of random directions, (rows, columns)."""

    name: str
    shape: tuple[int, int]
    norm: float
    relative_norm: float
    singular_values: list[float]
    effective_rank: float
    k: int
    row_overlap: float
    column_overlap: float
    random_overlap: tuple[float, float]
    amplification: float


def lora_updates(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, W, dW) of every LoRALinear: the base layer's weight and s B A (or DoRA's change)."""
    for name, layer in lora_layers(model):
        yield name, layer.base_layer.state_dict()["weight"], layer.delta_weight()


def full_updates(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, W, dW) of every matrix NAME.weight that both state dictionaries have in the same shape
    and that training moved; names compare with those of `lora_updates` of another run."""
    for key, weight in before.items():
        new = after.get(key)
        if not key.endswith(".weight") or weight.ndim != 2 or new is None or new.shape != weight.shape:
            continue
        delta = new.detach().cpu().double() - weight.detach().cpu().double()
        if delta.any():
            yield key.removesuffix(".weight"), weight, delta


@torch.no_grad()
def layer_spectrum(name: str, weight: Tensor, delta: Tensor, k: int = 8) -> LayerSpectrum:
    """The spectrum of an update; weight, delta (out, in), k leading directions (or what dW has)."""
    weight, delta = weight.detach().cpu().double(), delta.detach().cpu().double()
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)  # (out, m), (m,), (m, in)
    rank = int((s > s[0] * 1e-6).sum()) if s[0] > 0 else 0  # below that is rounding of float32
    s, k = s[:rank], min(k, rank)
    uw, _, vtw = torch.linalg.svd(weight, full_matrices=False)
    norm, size = float(delta.norm()), float(weight.norm())
    shares = s / s.sum() if rank else s
    projected = float((u[:, :k].T @ weight @ vt[:k].T).norm()) if k else 0.0
    return LayerSpectrum(
        name=name,
        shape=tuple(weight.shape),
        norm=norm,
        relative_norm=norm / size if size else float("inf"),
        singular_values=s.tolist(),
        effective_rank=float(torch.exp(-(shares * shares.log()).sum())) if rank else 0.0,
        k=k,
        row_overlap=subspace_similarity(vtw[:k].T, vt[:k].T),
        column_overlap=subspace_similarity(uw[:, :k], u[:, :k]),
        random_overlap=(k / weight.shape[1], k / weight.shape[0]),
        amplification=float(s[:k].norm()) / projected if projected else 0.0,
    )


def subspace_similarity(a: Tensor, b: Tensor) -> float:
    """phi = |A^T B|_F^2 / min(i, j), orthonormal A (n, i), B (n, j): 0 orthogonal, 1 one
    within the other."""
    least = min(a.shape[1], b.shape[1])
    return float((a.T @ b).square().sum()) / least if least else 0.0


def spectrum(updates: Iterable[tuple[str, Tensor, Tensor]], k: int = 8) -> list[LayerSpectrum]:
    """`layer_spectrum` of every (name, W, dW)."""
    return [layer_spectrum(name, weight, delta, k) for name, weight, delta in updates]


# title: the cell of a layer
COLUMNS = {
    "layer": lambda layer: layer.name,
    "shape": lambda layer: "x".join(map(str, layer.shape)),
    "|dW|/|W|": lambda layer: f"{layer.relative_norm:.4f}",
    "s1": lambda layer: f"{(layer.singular_values or [0])[0]:.4f}",
    "s2": lambda layer: f"{(layer.singular_values or [0])[:2][-1]:.4f}",
    "s last": lambda layer: f"{(layer.singular_values or [0])[-1]:.4f}",
    "rank": lambda layer: str(len(layer.singular_values)),
    "effective": lambda layer: f"{layer.effective_rank:.2f}",
    "rows": lambda layer: f"{layer.row_overlap:.3f}",
    "columns": lambda layer: f"{layer.column_overlap:.3f}",
    "random": lambda layer: f"{layer.random_overlap[0]:.3f}",
    "amplified": lambda layer: f"{layer.amplification:.2f}",
}


def format_spectrum(runs: Mapping[str, Sequence[LayerSpectrum]]) -> str:
    """A table per run and, after the last, how to read it."""
    tables = {name: spectrum_table(layers) for name, layers in runs.items()}
    parts = [f"{printable(name)}\n{text_table(table.columns, table.rows)}" for name, table in tables.items()]
    return "\n\n".join([*parts, HOW_TO_READ])


def spectrum_table(layers: Sequence[LayerSpectrum]) -> Table:
    """The numbers of a run's layers, a line each."""
    rows = [[cell(layer) for cell in COLUMNS.values()] for layer in layers]
    return Table("Spectrum in numbers", list(COLUMNS), rows, HOW_TO_READ)


def spectrum_figure(runs: Mapping[str, Sequence[LayerSpectrum]], path: str | Path) -> bool:
    """Relative norms, and singular values relative to the first; False without matplotlib."""
    pyplot = load_pyplot("spectrum")
    if pyplot is None:
        return False
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    longest = sorted(runs.values(), key=len, reverse=True)  # whose order the others follow
    names = list(dict.fromkeys(layer.name for layers in longest for layer in layers))
    for number, (name, layers) in enumerate(runs.items()):
        colour = f"C{number}"
        points = sorted((names.index(x.name), x.relative_norm) for x in layers)
        at, sizes = [x for x, _ in points], [y for _, y in points]
        left.plot(at, sizes, "o-", color=colour, markersize=3, label=plain(name))
        for i, layer in enumerate(layers):
            s = [value / layer.singular_values[0] for value in layer.singular_values]
            right.plot(range(1, len(s) + 1), s, color=colour, alpha=0.35, label=plain(name) if i == 0 else None)
    each = len(names) // 30 + 1  # more names than 30 could not be read
    left.set_xticks(range(0, len(names), each), [plain(one) for one in names[::each]], rotation=90, fontsize=8)
    left.set(title="size of the update, |dW| / |W|", ylim=(0, None))
    right.set(title="singular values of dW, one line per layer", xlabel="number", ylabel="relative to the first")
    right.set(yscale="log", ylim=(1e-3, 1.3))
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    return save_figure(pyplot, figure, path)
