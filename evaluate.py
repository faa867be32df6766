"""Use what train.py made: scores, predictions, a report page, attention maps, exported weights.

python evaluate.py runs/classify-lora-000                          scores on the validation data
python evaluate.py RUN --data-dir photos --predictions out.csv    also for pictures without labels
python evaluate.py RUN --image dog.jpg
python evaluate.py RUN1 RUN2 RUN3 --report comparison.html         mean and spread over seeds
python evaluate.py RUN --merge-to DIR --layout transformers        a model that transformers loads
python evaluate.py RUN --prune 0.5 --prune-scope units --merge-to DIR    smaller and faster
python evaluate.py --model clip-nano --task choice --data-format shapes  a base model, untrained
"""

# ruff: noqa: E402
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minilora.settings import exit_codes as cli
from minilora.settings.flags_evaluate import EvalConfig, check, evaluate_parser
from minilora.speed.threads import set_threads, settle_waiting

settle_waiting()  # before torch is loaded
if __name__ == "__main__":
    cli.begin(evaluate_parser(__doc__).read)  # what follows takes seconds to import

import torch
from PIL import Image

from minilora import ticker
from minilora.adapter import export_adapter
from minilora.atomic import atomic_write, write_json, write_png
from minilora.commands.compression import check_pruning, compression_report, latency
from minilora.commands.pages import attention_figures, names_of, report_data
from minilora.commands.results import resume_command, run_row, zero_shot_row
from minilora.errors import UserError
from minilora.formats.foreign import layout_table
from minilora.inject import merge_lora
from minilora.report import spectrum
from minilora.report.curves import read_metrics
from minilora.report.page import Figure, Table, write_report
from minilora.report.tables import RunRow, comparison_table, text_table
from minilora.report.vqa_metric import write_results as write_vqa_results
from minilora.settings.flags import PICTURE_FLAGS, Config
from minilora.settings.parse import check_prompt
from minilora.tasks import lock
from minilora.tasks.load import load_run, task_module
from minilora.tasks.run import Evaluation, Run
from minilora.tasks.runfiles import ended
from minilora.textfiles import csv_text, printable
from minilora.training.device import choose_device
from reference_models import ModelError, save_pretrained
from reference_models.files.names import file_layout
from reference_models.load import family_module

# beside an export, what asks for scores too; an export alone needs no data
SCORED = {"data_dir", "data_format", "split", "predictions", "submission", "report", "prune"}


def main(argv: Sequence[str] | None = None) -> int:
    typed, args = evaluate_parser(__doc__).read(argv)
    options = EvalConfig(**typed)
    check(options, typed, args.runs)
    device = choose_device(options.device)
    set_threads(options.threads)
    if not args.runs:
        return score_base_model(options, device)
    runs = [load_run(path, device, options.weights) for path in args.runs]
    for run in runs:
        run.amp = options.amp or run.amp
    if len({run.task for run in runs}) > 1:
        tasks = ", ".join(f"{run.name} {run.task}" for run in runs)
        raise UserError(f"the runs are of different tasks ({tasks}); compare those of one")
    for run in runs if options.classes else ():
        run.name_classes(options.classes)
    for run in (run for run in runs if not ended(run.config, run.summary)):
        done = f"has not ended, {len(read_metrics(run.path / 'metrics.jsonl'))} of {run.config.epochs} epochs are done"
        other = lock.at_work(run.path)
        todo = f"{other} trains there now" if other else f"continue it with: {resume_command(run.path)}"
        tell(f"{run.path}: {done}; {todo}")
    if options.image:
        return answer(runs[0], options)
    check_pruning(runs, options, typed)
    check_export(runs[0], options)
    exports = options.merge_to or options.export_adapter
    scored = score(runs, options) if not exports or SCORED & typed.keys() else ()
    tables, figures = extras(runs, options)
    if options.prune is not None:
        table, pruned = compression_report(runs, options)
        print(f"{text_table(table.columns, table.rows)}\n{table.note}")
        tables.setdefault("", []).append(table)
    if options.report:
        evaluations, rows = scored
        write_report(report_data(runs, evaluations, options, rows, tables, figures), options.report)
        tell(f"wrote {options.report}")
    if exports:
        runs = runs if options.prune is None else pruned
        export(runs[0], options)
    return 0


def score_base_model(options: EvalConfig, device: torch.device) -> int:
    """Zero-shot: the base model's own head, or prompts."""
    if options.model is None or (options.data_dir is None and options.data_format != "shapes"):
        raise UserError("name a run directory, or a base model with --model, --weights and --data-dir")
    names = ("task", "model", "weights", "tokenizer", "data_dir", "data_format", "image_size", "prompt", "bad_data")
    config = Config(**{name: getattr(options, name) for name in (*names, *PICTURE_FLAGS)})
    check_prompt(config.task, config.prompt)
    options = replace(options, amp=options.amp or "fp32", batch_size=options.batch_size or 64)
    print(task_module(config.task, "run").zero_shot(config, options, device))
    return 0


def answer(run: Run, options: EvalConfig) -> int:
    """The most probable answers for each picture of --image."""
    texts = {name: getattr(options, name) for name in ("question", "choices") if getattr(options, name) is not None}
    if texts and run.task == "classify":
        raise UserError(f"--{next(iter(texts))} is not for a run of --task classify; leave it out")
    images = [options.image] if isinstance(options.image, str) else options.image
    for image, row in zip(images, run.predict(list(images), **texts), strict=True):
        tell(f"{image}: " + (", ".join(f"{label} {100 * p:.1f} %" for label, p in row) or "no label is likely"))
    return 0


def tell(line: str) -> None:
    """Print a line in which names of files and classes are quoted."""
    print(printable(line))


def score(runs: list[Run], options: EvalConfig) -> tuple[list[Evaluation], list[RunRow]]:
    """(scores of each run, lines of the comparison); writes --predictions and --submission."""
    evaluations = [run.evaluate(options) for run in runs]
    for run, evaluation in zip(runs, evaluations, strict=True):
        scored = f"{evaluation.part}, {len(evaluation.rows)} {run.unit}"
        tell(f"{run.path} ({run.config.mode}, {run.config.model_name}, {run.amp}): {scored}")
        print(evaluation.text)
    rows = [run_row(run, e, options) for run, e in zip(runs, evaluations, strict=True)]
    if base := runs[0].untrained(options):
        rows.insert(0, zero_shot_row(runs[0], base, options))
    if len(rows) > 1:
        print(comparison_table(rows))
    first = evaluations[0]
    if options.predictions:
        write_csv(options.predictions, first.header, first.rows)
    if options.submission:
        write_submission(options.submission, first)
    return evaluations, rows


def extras(runs: list[Run], options: EvalConfig) -> tuple[dict[str, list[Table]], list[Figure]]:
    """--attention, --spectrum, --latency: ({run, or "" for all: tables}, figures) for a page."""
    tables, figures = {}, []
    if options.attention:
        figures = attention_figures(runs, options)
        if not figures:
            raise UserError(f"--attention: {runs[0].config.model} has no attention maps; leave the flag out")
        for figure in figures:
            write_png(beside(runs[0], "attention.png"), figure.image)
        figures = []
    if options.spectrum:
        layers = {
            name: spectrum.spectrum(ticker.through(updates(run, options), "spectrum, layers"))
            for name, run in zip(names_of(runs), runs, strict=True)
        }
        print(spectrum.format_spectrum(layers))
        tables = {name: [spectrum.spectrum_table(one)] for name, one in layers.items()}
        if spectrum.spectrum_figure(layers, path := beside(runs[0], "spectrum.png")):
            figures.append(Figure("Spectrum", Image.open(path)))
    if options.latency:
        how = f"median of 15 in {runs[0].amp} on {runs[0].device}, {torch.get_num_threads()} threads"
        times = [(name, *one) for name, run in zip(names_of(runs), runs, strict=True) for one in latency(run, options)]
        cells = [[name, n, f"{1000 * s:.1f}", f"{n / s:.0f}"] for name, n, s in times]
        tables[""] = [Table("Latency", ["run", "batch", "ms", "per second"], cells, f"A forward pass: {how}.")]
        for name, n, s in times:
            tell(f"{name}: batch {n} {1000 * s:.1f} ms ({n / s:.0f}/s), {how}")
    return tables, figures


def beside(run: Run, name: str) -> Path:
    """RUN/evaluation/NAME: the files that the training wrote stay as they are."""
    folder = run.path / "evaluation"
    folder.mkdir(exist_ok=True)
    tell(f"wrote {folder / name}")
    return folder / name


def updates(run: Run, options: EvalConfig):
    """(layer, W, dW) of everything that the run changed."""
    if run.config.mode == "lora":
        return list(spectrum.lora_updates(run.model))
    return list(spectrum.full_updates(run.base_model(options.weights).state_dict(), run.model.state_dict()))


def check_export(run: Run, options: EvalConfig) -> None:
    """UserError, before anything is computed, for what cannot be written in --layout."""
    if options.export_adapter:
        if (mode := run.config.mode) != "lora":
            raise UserError(f"--export-adapter: {run.name} is of mode {mode}; it has no adapter, use --merge-to")
        layout_table(run.model, options.layout)
    if options.merge_to:
        config = run.model.config
        file_layout(config, family_module(config.family).layouts, options.layout)


def export(run: Run, options: EvalConfig) -> None:
    """--export-adapter before --merge-to, which takes the adapter away."""
    if options.export_adapter:
        export_adapter(run.model, options.export_adapter, options.layout)
        tell(f"wrote {options.export_adapter}")
    if options.merge_to:
        run.model.labels, run.model.multi_label = run.labels, run.config.multi_label
        save_pretrained(merge_lora(run.model), options.merge_to, layout=options.layout)
        if getattr(run, "tokenizer", None) and run.task != "vqa":
            run.tokenizer.save(options.merge_to)
        tell(f"wrote {options.merge_to}")


def write_submission(path: str, evaluation: Evaluation) -> None:
    """A table in a .csv or .tsv file, else what the data set's toolkit reads, if it has one."""
    answers = evaluation.results
    if answers is None or path.endswith((".csv", ".tsv")):
        return write_csv(path, *evaluation.submission, guard=False)
    write_vqa_results(path, answers) if isinstance(answers, dict) else write_json(Path(path), answers)
    tell(f"wrote {path}: {len(answers)} answers to {evaluation.part}, as the toolkit's results json")


def write_csv(path: str, header: list[str], rows: list[list], guard: bool = True) -> None:
    """A table in UTF-8, whole or not at all. guard: no cell is a formula to a spreadsheet; what a
    server takes is written as it is."""
    atomic_write(Path(path), csv_text([header, *rows], guard))
    tell(f"wrote {path}: {len(rows)} rows")


if __name__ == "__main__":
    sys.exit(cli.run(main, (UserError, ModelError)))
