"""Tables of results as text or Markdown; runs compared, with mean and spread over seeds."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from minilora.textfiles import printable

# What may differ between two runs that count as the same configuration with other seeds.
NOT_CONFIGURATION = ("seed", "output", "resume", "workers", "device", "log_interval", "log_to", "save_every", "threads")
NOT_CONFIGURATION += ("config", "recipe", "dry_run", "seeds", "keep_checkpoints")


@dataclass
class RunRow:
    """One run's line in a comparison. Accuracies and F1 are fractions 0..1, None where not known.

    `group` is equal for runs of equal configuration (see `group_key`); those are averaged.
    `metric` names what `accuracy` is, such as "accuracy" or "official VQA accuracy". `data` says on
    what it was measured: runs on other data are not compared.
    """

    name: str
    mode: str
    group: str = ""
    seed: int | None = None
    model: str = ""
    data: str = ""
    epochs: str = ""
    augment: str = ""
    metric: str = "accuracy"
    accuracy: float | None = None
    balanced: float | None = None
    test_accuracy: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    train_accuracy: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    trainable: int | None = None
    total: int | None = None
    seconds: float | None = None
    peak_memory_mb: float | None = None
    file_mb: float | None = None


def group_key(config: dict) -> str:
    """Equal for two configurations (flags and values) that differ only in seed and bookkeeping."""
    return json.dumps({k: v for k, v in config.items() if k not in NOT_CONFIGURATION}, sort_keys=True, default=str)


@dataclass
class RunGroup:
    """Runs of equal configuration: `first` gives names and sizes, numbers are means over seeds."""

    first: RunRow
    runs: list[RunRow]

    @property
    def name(self) -> str:
        return self.first.name if len(self.runs) == 1 else f"{self.first.name} ({len(self.runs)} seeds)"

    def values(self, key: str) -> list[float]:
        return [getattr(run, key) for run in self.runs if getattr(run, key) is not None]

    def mean(self, key: str) -> float | None:
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def spread(self, key: str) -> float | None:
        """Sample standard deviation (n - 1); None for a single run, whose spread nobody knows."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None


def group_runs(rows: Sequence[RunRow]) -> list[RunGroup]:
    """Runs gathered by (group, mode), in order of appearance; rows without a group stand alone."""
    groups: dict[tuple, RunGroup] = {}
    for number, row in enumerate(rows):
        key = (row.group, row.mode) if row.group else (number,)
        groups.setdefault(key, RunGroup(row, [])).runs.append(row)
    return list(groups.values())


def _percent(group: RunGroup, key: str) -> str:
    mean, spread = group.mean(key), group.spread(key)
    return "" if mean is None else f"{100 * mean:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _number(group: RunGroup, key: str, digits: int) -> str:
    mean = group.mean(key)
    return "" if mean is None else f"{mean:,.{digits}f}"


def _trainable(group: RunGroup, _key: str) -> str:
    row = group.first
    if row.trainable is None:
        return ""
    return f"{row.trainable:,}" + (f" ({100 * row.trainable / row.total:.2f} %)" if row.total else "")


# title: (key in RunRow, how it is printed)
COLUMNS = {
    "run": ("name", lambda group, _: group.name),
    "backbone": ("model", lambda group, key: group.first.model),
    "model": ("model", lambda group, key: group.first.model),
    "data": ("data", lambda group, key: group.first.data),
    "epochs": ("epochs", lambda group, key: group.first.epochs),
    "mode": ("mode", lambda group, key: group.first.mode),
    "augment": ("augment", lambda group, key: group.first.augment),
    "trainable": ("trainable", _trainable),
    "seconds": ("seconds", lambda group, key: _number(group, key, 1)),
    "peak memory MB": ("peak_memory_mb", lambda group, key: _number(group, key, 0)),
    "file MB": ("file_mb", lambda group, key: _number(group, key, 2)),
    "train loss": ("train_loss", lambda group, key: _number(group, key, 4)),
    "eval loss": ("val_loss", lambda group, key: _number(group, key, 4)),
    "train accuracy %": ("train_accuracy", _percent),
    "accuracy %": ("accuracy", _percent),
    "balanced %": ("balanced", _percent),
    "test accuracy %": ("test_accuracy", _percent),
    "F1 %": ("f1", _percent),
    "recall %": ("recall", _percent),
    "precision %": ("precision", _percent),
    "metric": ("metric", lambda group, key: group.first.metric),
}
COMPARISON = ("run", "model", "mode", "data", "epochs", "trainable", "accuracy %", "balanced %", "test accuracy %")
COMPARISON += ("seconds", "peak memory MB", "file MB")
BACKBONES = ("backbone", "mode", "augment", "accuracy %", "test accuracy %", "peak memory MB", "seconds", "trainable")
# what a page adds to them
LOSSES = ("run", "train loss", "eval loss", "train accuracy %", "F1 %", "recall %", "precision %")


def comparison_cells(rows: Sequence[RunRow], columns: Sequence[str] = COMPARISON) -> tuple[list[str], list[list[str]]]:
    """(titles, cells), a line per group of equal configuration, without columns that no run fills;
    "accuracy %" is headed by the metric's own name where the runs agree on another one."""
    metrics = {row.metric for row in rows}
    if len(metrics) > 1:  # in one column: say which is which
        columns = [*columns, "metric"]
    metric = metrics.pop() if len(metrics) == 1 else "accuracy"
    lines = [[COLUMNS[title][1](group, COLUMNS[title][0]) for title in columns] for group in group_runs(rows)]
    used = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    titles = [f"{metric} %" if columns[i] == "accuracy %" else columns[i] for i in used]
    return titles, [[line[i] for i in used] for line in lines]


def by_data(rows: Sequence[RunRow]) -> dict[str, list[RunRow]]:
    """The rows of each data set, in order of first appearance."""
    return {data: [row for row in rows if row.data == data] for data in dict.fromkeys(row.data for row in rows)}


def comparison_table(rows: Sequence[RunRow], markdown: bool = False, columns: Sequence[str] = COMPARISON) -> str:
    """Runs side by side, a table per data set; mean ± sample standard deviation over seeds."""
    table = markdown_table if markdown else text_table
    return "\n\n".join(table(*comparison_cells(some, columns)) for some in by_data(rows).values())


def text_table(titles: Sequence, rows: Sequence[Sequence]) -> str:
    """Aligned plain text: first column to the left, numbers to the right."""
    cells = [[printable(cell) for cell in row] for row in rows]
    lines = [[printable(title) for title in titles], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    left = [i == 0 or not all(is_number(row[i]) for row in cells) for i in range(len(titles))]
    out = [
        "  ".join(c.ljust(w) if go else c.rjust(w) for c, w, go in zip(line, widths, left, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([out[0], "  ".join("-" * w for w in widths), *out[1:]])


def markdown_table(titles: Sequence, rows: Sequence[Sequence]) -> str:
    """The same cells as a Markdown table; a `|` inside a cell is escaped."""
    cells = [[printable(cell).replace("|", "\\|") for cell in row] for row in rows]
    left = [i == 0 or not all(is_number(row[i]) for row in cells) for i in range(len(titles))]
    rule = "|" + "|".join("---" if go else "---:" for go in left) + "|"
    return "\n".join(["| " + " | ".join(map(str, titles)) + " |", rule, *("| " + " | ".join(r) + " |" for r in cells)])


def is_number(cell: str) -> bool:
    """Whether a cell begins as a number does, or is empty."""
    return not cell or cell.lstrip("+-−")[:1].isdigit()
