"""Distillation and pruning measured: what a teacher gives its student, and what smaller models weigh, take and know.

python -m tests.benchmarks.compression distill --seeds 0 1 2                          generated scenes
python -m tests.benchmarks.compression distill --data-dir ../shared/data/easy_vqa --pictures 40
python -m tests.benchmarks.compression sizes --save                                   one table per task

distill: one teacher on the whole training set; students on --pictures of it, alone, with report R5's settings, and with
--distill-t2 and the alpha and temperature that were best for a seed that is not among those reported.
sizes: the runs of `distill` and their pruned forms, before and after learning on, and the same for two classifiers.
Runs lie in --work and are not repeated.
"""

import json
import statistics
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from minilora.commands.compression import COLUMNS, compression_cells, compression_rows, pruned_run
from minilora.settings.flags_evaluate import EvalConfig
from minilora.tasks import load_run
from tests.benchmarks.common import parser, prepare, report
from tests.support.cli_data import program

CHOOSING_SEED = 100  # alpha and temperature are chosen with it
train = program("train").main


def trained(arguments: Namespace, name: str, *words: str) -> tuple[Path, float]:
    """(run directory, accuracy of its best epoch); a run that is there already is not repeated."""
    path = Path(arguments.work) / name
    if not (path / "summary.json").exists():
        words = [*map(str, words), "--output", str(path), "--device", arguments.device, "--log-interval", "100000"]
        assert train(words) == 0
    return path, json.loads((path / "summary.json").read_text())["best"]["accuracy"]


def vqa_words(arguments: Namespace) -> list[str]:
    data = ["--data-dir", arguments.data_dir] if arguments.data_dir else []
    return ["--task", "vqa", "--fusion", "product", "--num-answers", "1000", "--batch-size", "32", *data]


def label(arguments: Namespace) -> str:
    return Path(arguments.data_dir).name if arguments.data_dir else "shapes"


def teacher_of(arguments: Namespace) -> tuple[Path, float]:
    words = ["--mode", "full", "--lr", "7e-4", "--head-lr", "3e-3", "--clip-grad", 1, "--group-by-image"]
    words += ["--batch-size", 256, "--epochs", arguments.teacher_epochs]
    return trained(arguments, f"{label(arguments)}-teacher", *vqa_words(arguments), *words)


def student(arguments: Namespace, seed: int, *distill: str) -> tuple[Path, float]:
    """A student on a small part of the data, which the seed draws too."""
    sizes = ["--subset", arguments.pictures, "--epochs", arguments.epochs, "--seed", seed, "--lr", "1e-3"]
    words = ["--model", "student-nano", "--weights", "none", "--mode", "full", *sizes, "--augment", arguments.augment]
    teacher = teacher_of(arguments)[0]
    tokens = ["--teacher", teacher] if distill else ["--tokenizer", teacher]
    kind = "-".join(word.removeprefix("--distill-") for word in map(str, distill)) or "alone"
    name = f"{label(arguments)}-{arguments.pictures}-{arguments.augment}-{kind}-seed{seed}"
    return trained(arguments, name, *vqa_words(arguments), *words, *tokens, *distill)


def chosen(arguments: Namespace) -> list[str]:
    """The flags of the best student of the choosing seed."""
    options = [
        ["--distill-t2", "--distill-alpha", alpha, "--distill-temperature", temperature]
        for alpha in arguments.alphas
        for temperature in arguments.temperatures
    ]
    scores = [student(arguments, CHOOSING_SEED, *words)[1] for words in options]
    return options[scores.index(max(scores))]


def distill(arguments: Namespace, header: str) -> None:
    """Accuracy of each kind of student, over the seeds."""
    best = chosen(arguments)
    kinds = {
        "student alone": [],
        "R5: alpha .9, T 15": ["--distill-alpha", 0.9, "--distill-temperature", 15],
        f"T^2, alpha {best[2]:g}, T {best[4]:g}": best,
    }
    rows, alone = [], None
    for name, words in kinds.items():
        values = [100 * student(arguments, seed, *words)[1] for seed in arguments.seeds]
        alone = alone or values
        gains = [value - base for value, base in zip(values, alone, strict=True)]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        each = ", ".join(f"{value:.2f}" for value in values)
        row = {"model": name, "accuracy %": f"{statistics.fmean(values):.2f}{spread}", "seeds": each}
        rows.append(row | {"gain": f"{statistics.fmean(gains):+.2f}"})
    header += f"\n{label(arguments)}: teacher {100 * teacher_of(arguments)[1]:.2f} %; students on {arguments.pictures}"
    header += f" pictures, {arguments.epochs} epochs, --augment {arguments.augment}; accuracy in validation"
    report(f"distill_{label(arguments)}", header, rows, arguments.save)


def family(path: Path, pruned: list[tuple[float, str]], epochs: int) -> tuple[list, list[str]]:
    """(runs, names): a run and its pruned forms, each at once and after learning on."""
    run, options = load_run(path), EvalConfig()
    runs, names = [run], [path.name]
    for share, scope in pruned:
        for more in (0, epochs):
            options = replace(EvalConfig(), prune=share, prune_scope=scope, prune_epochs=more)
            runs.append(pruned_run(run, options))
            how = f", {more} epochs {'of LoRA' if scope == 'units' else 'on the way'}" * bool(more)
            names.append(f"{path.name}, {share:g} of {scope}{how}")
    return runs, names


def sizes(arguments: Namespace, header: str) -> None:
    """Parameters, bytes, times and accuracy: teacher, students and pruned forms; ViT; MobileNetV2."""
    words = ["--lr", "1e-3", "--mode", "full", "--epochs", arguments.classifier_epochs, "--weights", "none"]
    mobile = ["--model", "mobilenet-v2-50", "--image-size", "64", *words]
    both = [(0.8, "backbone"), (0.5, "units")]
    tune, tables = arguments.tune, {}
    if "vit" in arguments.tables:
        run, _ = trained(arguments, "vit-nano", "--epochs", arguments.classifier_epochs)
        tables["shapes_vit"] = [family(run, both, tune)]
    if "mobilenet" in arguments.tables:
        run, _ = trained(arguments, "mobilenet", *mobile)
        tables["shapes_mobilenet"] = [family(run, [(0.8, "conv"), (0.8, "backbone")], tune)]
    if "vqa" in arguments.tables:
        seed = arguments.seeds[0]
        students = [student(arguments, seed)[0], student(arguments, seed, *chosen(arguments))[0]]
        alone = [([load_run(path) for path in students], [path.name for path in students])]
        tables[f"{label(arguments)}_vqa"] = [family(teacher_of(arguments)[0], both, tune), *alone]
    for name, groups in tables.items():
        runs, names = ([one for group in groups for one in group[i]] for i in (0, 1))
        measured = compression_rows(runs, names, EvalConfig(), arguments.rounds)
        first = measured[0]["seconds"]
        rows = [dict(zip(COLUMNS, cells, strict=True)) for cells in compression_cells(measured)]
        for row, one in zip(rows, measured, strict=True):
            row["faster at 64"] = f"{first[64] / one['seconds'][64]:.2f}x"
        report(f"compression_{name}", header, rows, arguments.save)


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("part", choices=("distill", "sizes"))
    flags.add_argument("--data-dir", default=None, help="questions in the files of VQA v2; generated scenes without")
    flags.add_argument("--pictures", type=int, default=40, help="training pictures of the students")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--epochs", type=int, default=40, help="of the students")
    flags.add_argument("--teacher-epochs", type=int, default=24)
    flags.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.5], help="to choose from, with --distill-t2")
    flags.add_argument("--temperatures", type=float, nargs="+", default=[3.0, 15.0])
    flags.add_argument("--tables", nargs="+", default=["vit", "mobilenet", "vqa"], choices=["vit", "mobilenet", "vqa"])
    flags.add_argument("--augment", default="none", choices=("none", "basic", "rand"))
    flags.add_argument("--classifier-epochs", type=int, default=8)
    flags.add_argument("--tune", type=int, default=2, help="epochs of learning on after pruning")
    flags.add_argument("--work", default="runs/compression")
    arguments = flags.parse_args()
    header = prepare(arguments)
    {"distill": distill, "sizes": sizes}[arguments.part](arguments, header)


if __name__ == "__main__":
    main()
