"""A table of few shots: a classifier trained on K pictures of each class, for several K.

    python -m minilora.commands.shots --data-dir photos --model clip-vit-b-16 --weights DIR \\
        --recipe clip-lora --shots 1 2 4 8 16 --seeds 1 2 3 --output shots

The other flags are train.py's. A run for each head, K and seed in OUTPUT/HEAD-K-SEED, each in a
process of its own; finished ones are not made again, a stopped one is resumed. A cell is the mean
accuracy over the seeds and its sample standard deviation: on test/ where the data have one, else in
validation. Zero-shot stands beside them where classes are sentences. The table goes to stdout and
to OUTPUT/table.md, its plot to OUTPUT/shots.png, what the runs say to stderr.
"""

import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.atomic import atomic_write
from minilora.commands.backbones import make_folder, make_plan, read_table, run_plan, values_of
from minilora.errors import UserError
from minilora.report.curves import COLOURS
from minilora.report.plots import load_pyplot, save_figure
from minilora.report.tables import markdown_table, text_table
from minilora.settings import exit_codes as cli
from minilora.settings.flags import Config, flag
from minilora.settings.parse import Parser
from minilora.tasks.classify.task import default_head, open_data
from minilora.tasks.runfiles import read_summary
from reference_models import ModelError

T = "the table"
SHOTS = ("1", "2", "4", "8", "16")
ZERO_SHOT = "zero-shot"
Cells = dict[str, dict[int | str, list[float]]]  # {head: {K or ZERO_SHOT: accuracy of each seed}}


# fmt: off
@dataclass
class FewShots(Config):
    """train.py's flags, some of which take several values here."""

    shots: Any = flag(T, SHOTS, "pictures of each class", many=True, meta="K")
    heads: Any = flag(T, None, "names, linear", many=True, meta="HEAD", shown="names for a CLIP, else linear")
    seeds: Any = flag(T, None, "one run for each; the table has mean and spread", many=True, meta="N", shown="0")
# fmt: on


def main(argv: Sequence[str] | None = None) -> int:
    plan, output = read_plan(argv)
    cells: Cells = {}

    def finish(path: Path, config: Config) -> None:
        summary, row = read_summary(path), cells.setdefault(config.head, {})
        tested, untrained = summary.get("test"), summary.get("zero_shot")
        row.setdefault(config.shots, []).append((tested or summary["best"])["accuracy"])
        if untrained:
            row.setdefault(ZERO_SHOT, []).append(untrained["test_accuracy" if tested else "accuracy"])
        atomic_write(output / "table.md", markdown_table(*table(cells)) + "\n")

    failed = run_plan(plan, output, finish)
    if cells:
        print(text_table(*table(cells)))
        shots_figure(cells, output / "shots.png")
    return failed


def read_plan(argv: Sequence[str] | None = None) -> tuple[dict[str, Config], Path]:
    """({name of a run: its whole configuration}, the folder for all of them). Raises UserError for
    what can be known before the first run: flags, heads, data, classes with too few pictures."""
    usage, title = "--output DIR [flags of train.py]", __doc__.partition("\n")[0]
    shared, lists, output = read_table(Parser(FewShots, "python -m minilora.commands.shots", usage, title), argv)
    shots = values_of(shared, "shots", lists["shots"] or SHOTS)
    heads = values_of(shared, "head", lists["heads"] or [shared.head or default_head(shared)])
    runs = []
    for head, k, seed in itertools.product(heads, shots, values_of(shared, "seed", lists["seeds"])):
        sentences = {} if head == "names" else {"prompt": None, "tokenizer": None}
        runs.append((f"{head}-{k}-{seed}", {"head": head, "shots": k, "seed": seed} | sentences))
    plan = make_plan(shared, runs, "name every K, head and seed once")
    open_data(max(plan.values(), key=lambda config: config.shots))
    return plan, make_folder(output)


def table(cells: Cells) -> tuple[list[str], list[list[str]]]:
    """(titles, a row for each head): accuracy in percent, mean and spread over the seeds."""
    columns = sorted({k for row in cells.values() for k in row}, key=lambda k: 0 if k == ZERO_SHOT else k)
    titles = ["head", *(k if k == ZERO_SHOT else f"{k} shot" + "s" * (k > 1) for k in columns)]
    return titles, [[head, *(_cell(row.get(k)) for k in columns)] for head, row in cells.items()]


def _cell(values: list[float] | None) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(set(values)) > 1 else ""
    return f"{100 * statistics.fmean(values):.2f}{spread}"


def shots_figure(cells: Cells, path: Path) -> None:
    """Accuracy over K, a line for each head with the spread over its seeds; zero-shot dashed."""
    pyplot = load_pyplot("shots.png")
    if pyplot is None:
        return
    figure, axis = pyplot.subplots(figsize=(4.6, 3.4), layout="constrained")
    for colour, (head, row) in zip(COLOURS, cells.items(), strict=False):
        found = {k: [100 * a for a in values] for k, values in row.items()}
        if before := found.pop(ZERO_SHOT, None):
            axis.axhline(statistics.fmean(before), color=colour, linestyle="--", label=f"{head}, {ZERO_SHOT}")
        means = [statistics.fmean(values) for values in found.values()]
        spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in found.values()]
        axis.errorbar(list(found), means, spread, color=colour, marker="o", markersize=3, capsize=3, label=head)
    axis.set(xscale="log", xlabel="pictures of each class", ylabel="accuracy %")
    ticks = sorted({k for row in cells.values() for k in row} - {ZERO_SHOT})
    axis.set_xticks(ticks, map(str, ticks), minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, frameon=False)
    save_figure(pyplot, figure, path)


if __name__ == "__main__":
    sys.exit(cli.run(main, (UserError, ModelError)))
