"""What report.html shows of one run, or of several side by side."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from minilora.inject import count_parameters
from minilora.report.attention import attention_figure, layer_heats
from minilora.report.metrics import NAMES, percent
from minilora.report.page import Figure, ReportData, Table, collect_versions, parameter_rows
from minilora.report.sections import value_text
from minilora.report.tables import RunRow
from minilora.settings.flags import Config, rules
from minilora.tasks.run import WEIGHT_FILES, Evaluation, Run

SHOWN = 4  # attention maps on a page where their number is not said
# what a page takes from an Evaluation as it is
AS_FOUND = ("metrics", "vqa", "answer_histogram", "samples", "mistakes", "unsure", "examples")
HOW_TO_READ = (
    "Light: the patches that the class token attends to. Last layer is the mean over its heads; rollout follows the "
    "attention through all layers. Below the maps of a trained model stands what it said; models that look at the "
    "same places share their maps."
)


def data_name(config: Config) -> str:
    """The data set, short: the last two folders of --data-dir."""
    return "/".join(Path(config.data_dir).parts[-2:]) if config.data_dir else "generated"


def scored_on(run: Run, evaluation: Evaluation, options: Any) -> str:
    """On what a run was scored: runs of which this differs are not compared."""
    return f"{data_name(run.data_config(options))}, {evaluation.part} ({len(evaluation.rows):,} {run.unit})"


def names_of(runs: Sequence[Run]) -> list[str]:
    """The runs' names; their paths, where two have one name."""
    names = [run.name for run in runs]
    return [str(run.path) if names.count(run.name) > 1 else run.name for run in runs]


def report_data(
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    options: Any,
    rows: Sequence[RunRow] = (),
    tables: Mapping[str, Sequence[Table]] | None = None,
    figures: Sequence[Figure] = (),
) -> ReportData:
    """Everything the page shows. Of several runs: what compares them, then the parts of each.

    rows: the lines of the comparison; tables: {name of a run, "" for all: what was asked for beside
    the scores}; figures: pictures of all.
    """
    names, tables = names_of(runs), tables or {}
    triples = list(zip(names, runs, evaluations, strict=True))
    curves = {name: run.path / "metrics.jsonl" for name, run, _ in triples}
    best = {name: epoch for name, run, _ in triples if (epoch := best_epoch(run))}
    shared = {"curves": curves, "best": best, "figures": [*attention_figures(runs, options), *figures]}
    parts = [one_run(run, name, found, options, tables.get(name, ())) for name, run, found in triples]
    if len(runs) == 1:
        return replace(parts[0], **shared, tables=[*parts[0].tables, *tables.get("", ())])
    settings, versions = [part.configuration for part in parts], parts[0].versions
    seen: set[str] = set()
    for part, (_, run, found) in zip(parts, triples, strict=True):
        part.configuration = {}
        part.versions = {} if part.versions == versions else part.versions
        if (on := scored_on(run, found, options)) in seen:
            part.samples = {}  # those of an earlier run
        seen.add(on)
    same = {key: value for key, value in settings[0].items() if all(one.get(key) == value for one in settings)}
    other = [[key, *(value_text(one.get(key)) for one in settings)] for key in settings[0] if key not in same]
    differing = Table("Configuration: what differs", ["flag", *names], other)
    facts = {"runs": str(len(runs)), "data sets": str(len(seen))}
    scored = [(found.scores[main_score(found.scores)], name) for name, _, found in triples if found.scores]
    if scored and len(seen) == 1:
        facts |= {f"best accuracy, {max(scored)[1]}": f"{100 * max(scored)[0]:.2f} %"}
    return ReportData(
        title=" and ".join(names[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else ""),
        subtitle=f"comparison of {len(runs)} runs, {runs[0].task}, {datetime.date.today()}",
        facts=facts,
        runs=rows,
        **shared,
        tables=[*tables.get("", ()), differing],
        configuration=same,
        versions=versions,
        parts=parts,
    )


def best_epoch(run: Run) -> int | None:
    """The epoch whose weights a run has kept, as far as it is known."""
    return (run.summary.get("best") or {}).get("epoch")


def one_run(run: Run, name: str, found: Evaluation, options: Any, tables: Sequence[Table]) -> ReportData:
    """The page of one run, but for curves and attention."""
    counts = count_parameters(run.model)
    parameters = ((name, p.numel(), p.requires_grad) for name, p in run.model.named_parameters())
    return ReportData(
        title=name,
        subtitle=f"{run.task}, {run.config.model_name}, mode {run.config.mode}, {datetime.date.today()}",
        facts=facts_of(run, found, counts),
        scores=scores_of(run, found, options),
        parameters=parameter_rows(parameters),
        parameter_line=str(counts),
        tables=tables,
        configuration={key: value for key, value in asdict(run.config).items() if key in rules(type(run.config))},
        versions=run.summary.get("versions") or collect_versions(),
        **{name: getattr(found, name) for name in AS_FOUND},
    )


def facts_of(run: Run, found: Evaluation, counts: Any) -> dict[str, str]:
    """The headline numbers: what came out, on what, and what it took."""
    summary, count = run.summary, len(found.rows)
    facts = {}
    if found.scores:
        main = main_score(found.scores)
        keys = (key for key in ("balanced", "f1") if key in found.scores)
        facts = {NAMES[main]: percent(found.scores[main], count * (main == "accuracy"))}
        facts |= {NAMES[key]: percent(found.scores[key]) for key in keys}
    facts |= {"scored": f"{found.part}, {count:,} {run.unit}"}
    tested = summary.get("test") or {}
    facts |= {f"test {NAMES[key]}": percent(tested[key]) for key in tested if key in ("accuracy", "map")}
    if "unlabelled" in (counted := summary.get("rows") or {}):
        facts |= {"labelled rows": f"{counted['train']:,}", "unlabelled rows": f"{counted['unlabelled']:,}"}
    trainable = (summary.get("parameters") or {}).get("trainable", counts.trainable)
    facts |= {"trainable": f"{trainable:,}", "all parameters": f"{counts.total:,}"}
    if summary.get("seconds") is not None:
        facts["training"] = f"{summary['seconds']:,.1f} s"
    if summary.get("peak_memory_mb") is not None:
        facts["peak memory"] = f"{summary['peak_memory_mb']:,.0f} MiB"
    return facts | {"weights file": f"{(run.path / WEIGHT_FILES[run.config.mode]).stat().st_size / 1e6:.2f} MB"}


def scores_of(run: Run, found: Evaluation, options: Any) -> list[tuple[str, str, str]]:
    """(what, on what, accuracy): this run, and everything that it is to be compared with."""
    if not found.scores:
        return []
    on, main = scored_on(run, found, options), main_score(found.scores)
    best, test, before = (run.summary.get(key) or {} for key in ("best", "test", "zero_shot"))
    rows = [(f"this run, {NAMES[main]}", on, percent(found.scores[main], len(found.rows) * (main == "accuracy")))]
    rows += [(f"baseline: {name}", on, percent(share)) for name, share in found.baselines.items()]
    own = [(f"in training, best epoch {best_epoch(run)}", "val", best.get(main))]
    own = [row for row in [*own, ("at the end of training", "test", test.get(main))] if row[1] != found.part]
    own += [("before training, zero-shot", "val", before.get("accuracy"))]
    own += [("before training, zero-shot", "test", before.get("test_accuracy"))]
    there = data_name(run.config)
    return rows + [(what, f"{there}, {part}", percent(share)) for what, part, share in own if share is not None]


def main_score(scores: Mapping[str, float]) -> str:
    """The score that runs are compared by: accuracy, of several labels mean average precision."""
    return "map" if "map" in scores else "accuracy"


def attention_figures(runs: Sequence[Run], options: Any) -> list[Figure]:
    """Attention of the base models and of each run, together where they see the same pictures; []
    where no model has attention maps."""
    number = SHOWN if options.attention is None else options.attention
    one_base = len({run.config.model_name for run in runs}) == 1
    # pictures, titles, {name: model}, {name: its answers}
    groups: list[tuple[torch.Tensor, list[str], dict, dict]] = []
    for run, name in zip(runs, names_of(runs), strict=True) if number else ():
        batch = run.batch(number, options)
        pictures = run.pictures(batch)
        if not layer_heats(run.model, pictures[:1]):
            continue
        group = next((g for g in groups if g[0].shape == pictures.shape and torch.equal(g[0], pictures)), None)
        if group is None:
            groups.append(group := (pictures, run.captions(batch), {}, {}))
        base = "base" if one_base else f"base {run.config.model_name}"
        if run.config.mode != "full" and base not in group[2]:
            group[2][base] = run.base_model(options.weights)
        shown = name if len(runs) > 1 else run.config.mode
        group[2][shown], group[3][shown] = run.model, run.said(batch)
    return [
        Figure(
            "Attention" + f": {', '.join(said)}" * (len(groups) > 1),
            attention_figure(models, pictures, per_head=options.per_head, titles=titles, said=said),
            HOW_TO_READ,
        )
        for pictures, titles, models, said in groups
    ]
