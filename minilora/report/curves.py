"""Learning curves: loss, accuracy and learning rate of one run or of several in the same picture.

Solid lines are validation, dashed ones training; a run keeps its colour in all panels. A ring marks
the best epoch, whose weights the run has kept.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from minilora.report.plots import load_pyplot, plain, save_figure
from minilora.textfiles import read_bytes

# panel title, with its unit: (scale, [(key in metrics.jsonl, dashed)])
PANELS = {
    "loss": (1, [("train_loss", True), ("val_loss", False)]),
    "accuracy %": (100, [("train_accuracy", True), ("accuracy", False)]),
    "mean average precision %": (100, [("map", False)]),
    "learning rate": (1, [("lr", False)]),
}
COLOURS = ("#3563c9", "#c8562b", "#2a8a5f", "#8a4fbf", "#a07c14", "#b8326d", "#3b8ea5", "#6b6b6b")

Records = Sequence[Mapping]


def read_metrics(source: str | Path | Records) -> list[dict]:
    """The lines of a metrics.jsonl, without one cut short by a crash; no file, no lines."""
    if not isinstance(source, (str, Path)):
        return [dict(record) for record in source]
    path, records = Path(source), []
    if not path.is_file():
        return records
    for line in read_bytes(path).decode(errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [record for record in records if isinstance(record, dict)]


def curve(records: Records, key: str, scale: float = 1) -> tuple[list[float], list[float]]:
    """(epochs, scale * values) of `key`, where a line has it and it is finite."""
    points = [(record.get("epoch", number), record.get(key)) for number, record in enumerate(records, 1)]
    points = [(float(x), float(y)) for x, y in points if _finite(x) and _finite(y)]
    return [x for x, _ in points], [scale * y for _, y in points]


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e300 and math.isfinite(value)


def curves_figure(
    runs: Mapping[str, str | Path | Records], path: str | Path, best: Mapping[str, int] | None = None
) -> bool:
    """Draw {run name: metrics.jsonl or records} as PNG; best: {run name: its best epoch}. Without
    matplotlib: one printed line, and False."""
    pyplot = load_pyplot("curves")
    if pyplot is None:
        return False
    found = {name: read_metrics(source) for name, source in runs.items()}
    several = any("map" in record for records in found.values() for record in records)
    panels = {title: panel for title, panel in PANELS.items() if several or panel[1][0][0] != "map"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for axis, (title, (scale, keys)) in zip(axes, panels.items(), strict=True):
        for number, (name, records) in enumerate(found.items()):
            for key, dashed in keys:
                x, y = curve(records, key, scale)
                if not x:
                    continue
                part = f" ({'train' if dashed else 'validation'})" if len(keys) > 1 else ""
                style = {"color": COLOURS[number % len(COLOURS)], "linestyle": "--" if dashed else "-"}
                axis.plot(x, y, marker="o" if len(x) < 15 else None, markersize=3, label=plain(name) + part, **style)
                at = (best or {}).get(name)
                if not dashed and key != "lr" and at in x:
                    ring = {"markersize": 10, "fillstyle": "none", "color": style["color"], "linestyle": ""}
                    axis.plot([at], [y[x.index(at)]], "o", label=f"best epoch, {at}", **ring)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=9, frameon=False)
    return save_figure(pyplot, figure, path)
