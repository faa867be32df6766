"""A table of backbones: train each of a list, with LoRA or in full, with or without augmentation.

    python -m minilora.commands.backbones --models vit-tiny-patch16-224 beit-base-patch16-224 \\
        --weights none --modes lora full --augment none basic --data-dir photos --output backbones

The other flags are train.py's. Each combination is a run of train.py in a process of its own, so
that its peak of memory is its own, in OUTPUT/MODEL-MODE-AUGMENT. Finished runs are not made again,
a stopped one is resumed, a failed one is named and the others continue. The table goes to stdout
and to OUTPUT/table.md, what the runs say to stderr.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minilora.atomic import atomic_write
from minilora.commands.results import summary_row
from minilora.errors import UserError
from minilora.report.tables import BACKBONES, RunRow, comparison_table
from minilora.settings import exit_codes as cli
from minilora.settings.flags import Config, flag, rules
from minilora.settings.parse import Parser, check, given, read_recipe, read_toml, to_toml
from minilora.settings.values import convert, option
from minilora.tasks.classify.task import default_head, open_data
from minilora.tasks.method import resolve
from minilora.tasks.precision import settle_precision
from minilora.tasks.rundir import differences
from minilora.tasks.runfiles import read_summary
from minilora.tasks.weights import find_weights
from minilora.training.device import choose_device
from reference_models import ModelError
from reference_models.load import config_for

TRAIN = Path(__file__).parents[2] / "train.py"
T = "the table"
# flags of train.py that make no row of this table
NOT_HERE = ("task", "resume", "adapter", "teacher", "dry_run")


# fmt: off
@dataclass
class Sweep(Config):
    """train.py's flags, some of which take several values here."""

    models: Any = flag(T, None, "names of train.py --list-models, or folders", many=True, meta="NAME")
    modes: Any = flag(T, None, "lora, full, linear", many=True, meta="MODE", shown="lora")
    augment: Any = flag(T, None, "none, basic, rand", many=True, meta="KIND", shown="none")
    seeds: Any = flag(T, None, "one run for each; the table has mean and spread", many=True, meta="N", shown="0")
    weights: Any = flag(T, None, "MODEL=FILE, =DIR, =hf:org/name or =none; without MODEL= for all others", many=True,
        meta="MODEL=PLACE", shown="bundled")
# fmt: on


def main(argv: Sequence[str] | None = None) -> int:
    plan, output = read_plan(argv)
    rows: list[RunRow] = []

    def finish(path: Path, config: Config) -> None:
        rows.append(summary_row(path, config, read_summary(path)))
        atomic_write(output / "table.md", comparison_table(rows, markdown=True, columns=BACKBONES) + "\n")

    failed = run_plan(plan, output, finish)
    if rows:
        print(comparison_table(rows, columns=BACKBONES))
    return failed


def run_plan(plan: dict[str, Config], output: Path, finish: Callable[[Path, Config], None]) -> int:
    """Make the runs that are not there yet, `finish` after each; 1 where one failed."""
    failed = {}
    for number, (name, config) in enumerate(plan.items(), 1):
        path = output / name
        print(f"{number} of {len(plan)}: {name}", file=sys.stderr, flush=True)
        try:
            reason = None if finished(path, config) else train(path, config)
            if reason is None:
                finish(path, config)
        except (UserError, OSError) as error:  # the folder holds something else, or a damaged run
            reason = str(error)
        if reason is not None:
            failed[name] = reason
    for name, reason in failed.items():
        print(f"failed: {name}: {cli.printable(reason)}", file=sys.stderr)
    return 1 if failed else 0


def read_plan(argv: Sequence[str] | None = None) -> tuple[dict[str, Config], Path]:
    """({name of a run: its whole configuration}, the folder for all of them). Raises UserError for
    what can be known before the first run: flags, models, weights, data."""
    usage, title = "--models NAME ... --output DIR [flags of train.py]", __doc__.partition("\n")[0]
    parser = Parser(Sweep, "python -m minilora.commands.backbones", usage, title)
    shared, lists, output = read_table(parser, argv)
    if not (models := lists["models"]):
        raise UserError(f"--models is missing; see {parser.prog} --help")
    flags = {"mode": "modes", "augment": "augment", "seed": "seeds"}
    modes, augments, seeds = (values_of(shared, key, lists[name]) for key, name in flags.items())
    places = weights_of(models, lists["weights"] or ())
    runs = []
    for model, mode, augment, seed in itertools.product(models, modes, augments, seeds):
        own = {"model": model, "mode": mode, "augment": augment, "seed": seed, "weights": places[model]}
        runs.append((f"{Path(model).name}-{mode}-{augment}" + f"-{seed}" * (len(seeds) > 1), own))
    plan = make_plan(shared, runs, "name each model once, folders by different names")
    open_data(next(iter(plan.values())))
    return plan, make_folder(output)


def read_table(parser: Parser, argv: Sequence[str] | None) -> tuple[Config, dict[str, Any], Path]:
    """(what all runs of a table share, {flag of the table: its several values or None}, --output);
    --seeds of a table stands for --seed of train.py, and so its other flags in s."""
    (typed, _), table = parser.read(argv), parser.prog.rpartition(".")[2]
    several = list(parser.table.__annotations__)
    instead = {name.removesuffix("s"): name for name in several if name.endswith("s")}
    for name in (*instead, *NOT_HERE):
        if name in typed:
            hint = f"; use {option(instead[name])}" if name in instead else ""
            raise UserError(f"{option(name)} is not for a table of {table}{hint}")
    if "output" not in typed:
        raise UserError(f"--output is missing; see {parser.prog} --help")
    output, lists = Path(typed.pop("output")), {name: typed.pop(name, None) for name in several}
    # one word with a sign of regular expressions, such as a folder "vit+1", comes as it is
    lists = {name: [words] if isinstance(words, str) else words for name, words in lists.items()}
    from_file = read_toml(typed.pop("config")) if "config" in typed else {}
    recipe = typed.get("recipe", from_file.get("recipe"))
    shared = (read_recipe(recipe) if recipe else {}) | from_file | typed
    if shared.get("task", "classify") != "classify":
        raise UserError(f"--task {shared['task']}: a table of {table} is for --task classify")
    if not TRAIN.is_file():
        raise UserError(f"{TRAIN} is missing: this command needs the project's folder, not the package alone")
    return Config(**shared), lists, output


def make_folder(output: Path) -> Path:
    """The folder of a table, made where it is not there."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made: {error.strerror}") from None
    return output


def make_plan(shared: Config, runs: Iterable[tuple[str, dict[str, Any]]], once: str) -> dict[str, Config]:
    """{name: checked configuration} of (name, its own flags); `once` says how names differ."""
    plan = {}
    for name, own in runs:
        config = Config(**vars(shared) | own)
        check(config)
        resolve(config, None)
        config.head = config.head or default_head(config)
        if name in plan:
            raise UserError(f"two runs would be called {name}; {once}")
        plan[name] = config
    return plan


def values_of(shared: Config, key: str, words: Sequence[str] | None) -> list:
    """The values of one flag, read by its rule; without words what recipe or default say."""
    return [convert(key, rules(Config)[key], word) for word in words] if words else [getattr(shared, key)]


def weights_of(models: Sequence[str], words: Sequence[str]) -> dict[str, str | None]:
    """{model: where its weights are} from MODEL=PLACE, or PLACE for all models that are not named.
    Raises UserError (ModelError) for unknown models, and for weights of no model or not there."""
    named, rest = {}, None
    for word in words:
        model, equals, place = word.partition("=")
        if equals and model not in models:
            raise UserError(f"--weights {word}: {model} is not one of --models {' '.join(models)}")
        if equals:
            named[model] = place
        elif rest is None:
            rest = word
        else:
            raise UserError(f"--weights {rest} {word}: which is whose? Write MODEL=PLACE")
    places = {model: named.get(model, rest) for model in models}
    for model, place in places.items():
        if not os.path.isdir(model):
            config_for(model)
        source = find_weights(model, place)
        if source and not str(source).startswith("hf:") and not os.path.exists(source):
            raise UserError(f"--weights of {model}: {source}: no such file or directory")
    return places


def finished(path: Path, config: Config) -> bool:
    """Whether the run is there, whole, and of this configuration."""
    if not ((path / "summary.json").is_file() and (path / "config.toml").is_file()):
        return False
    settled = replace(config, output=str(path))
    settle_precision(settled, choose_device(config.device))
    return not differences(path, settled)


def train(path: Path, config: Config) -> str | None:
    """One run of train.py in a process of its own; None, or why it failed. When this process ends,
    the run is asked to save and stop."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        # a recipe would speak again where a flag was set back to its default
        file.write_text(to_toml(config, only=given(config) - {"recipe"}), encoding="utf-8")
        words = [sys.executable, str(TRAIN), "--config", str(file), "--output", str(path)]
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
        )
        try:
            reason = _relay(process)
        except BaseException:
            process.terminate()
            _relay(process)
            raise
    return reason if process.returncode else None


def _relay(process: subprocess.Popen) -> str:
    """Passes on what a run prints until it ends; its line of error, else its last words."""
    error = last = ""
    for line in process.stdout:
        print(f"  {line}", end="", file=sys.stderr, flush=True)
        last = line.strip() or last
        error = line.removeprefix("error:").strip() if line.startswith("error:") else error
    code = process.wait()
    return error or (f"stopped by signal {-code}" if code < 0 else f"exit code {code}: {last}")


if __name__ == "__main__":
    sys.exit(cli.run(main, (UserError, ModelError)))
