"""From flags to a checked configuration: command line, TOML files, recipes, defaults.

    config, _ = parse_args(["--recipe", "imagewoof-vit-tiny", "--lr", "1e-3"])

Flags win over --config, --config over --recipe, --recipe over the defaults. The resolved
configuration is written to the run directory as config.toml, which --config reads back.
"""

import argparse
import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from minilora.errors import UserError
from minilora.settings.flags import TASKS, Config, Rule, rules
from minilora.settings.values import close_match, convert, option
from minilora.textfiles import encodable, read_text
from minilora.version import __version__

RECIPES = Path(__file__).parent / "recipes"
LONGEST, DOTS = 1 << 18, 2000  # of a TOML file; the time for a key grows with its dots squared
BASE = "base"  # a table of config.toml that is no flag: the base weights with their sha256
# what version 0.1 did unless it says more
FIRST = {"vqa": {"fusion": "product", "text_pooling": "pooler"}, "classify": {"head": "linear"}}
# what config.toml leaves out: how a run was started
NOT_SAVED = ("config", "dry_run", "output", "resume", "seeds")
LORA_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "target_modules", "layers", "train_norms", "train_bias")
LORA_FLAGS += ("use_rslora", "use_dora", "lora_plus")
ELSEWHERE = {  # what other programs call it, where the name alone does not give it away
    "learning-rate": "--lr",
    "rank": "--lora-r",
    "r": "--lora-r",
    "alpha": "--lora-alpha",
    "gpu": "--device",
    "cuda": "--device",
    "dataset": "--data-dir",
    "pretrained": "--weights",
    "checkpoint": "--weights",
    "fp16": "--amp",
    "bf16": "--amp",
}


class Parser(argparse.ArgumentParser):
    """argparse for a table of flags: errors in one line with a hint, help in 100 columns."""

    def __init__(self, table: type, prog: str, usage: str, description: str, epilog: str = ""):
        usage = f"{prog} {usage}"
        super().__init__(prog, usage, description, epilog, formatter_class=_HelpFormatter, allow_abbrev=False)
        self.table = table
        self.add_argument("--version", action="version", version=f"minilora {__version__}")
        groups: dict[str, Any] = {}
        for f in dataclasses.fields(table):
            rule = f.metadata["rule"]
            if rule.group not in groups:
                groups[rule.group] = self.add_argument_group(rule.group)
            _add_flag(groups[rule.group], f.name, rule, f.default)

    def error(self, message: str):
        message = re.sub(r": expected .*argument.*", " needs a value", message.removeprefix("argument "))
        raise UserError(f"{message}; see {self.prog} --help")

    def _unknown(self, word: str) -> str:
        """What to say of a word that no flag takes."""
        known = [name for action in self._actions for name in action.option_strings]
        if word.startswith("-"):
            elsewhere = ELSEWHERE.get(word.lstrip("-"))
            hint = f"; did you mean {elsewhere}?" if elsewhere in known else close_match(word, known)
            return f"unknown flag {word}{hint}"
        if os.path.exists(word):
            return f"{word!r} belongs to no flag; data go with --data-dir, a run with --resume or --adapter"
        return f"{word!r} belongs to no flag{close_match(word, known)}"

    def read(self, argv: Sequence[str] | None) -> tuple[dict[str, Any], argparse.Namespace]:
        """({field: value} of the flags that were typed, everything that argparse read)."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            raise UserError(f"{self._unknown(unknown[0].split('=')[0])}; see {self.prog} --help")
        table = rules(self.table)
        typed = {name: value for name, value in vars(args).items() if name in table}
        return {name: convert(name, table[name], value) for name, value in typed.items()}, args


def parse_args(argv: Sequence[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """(checked configuration of train.py, what argparse read, such as --list-models)."""
    typed, args = train_parser().read(argv)
    from_file = read_toml(typed["config"]) if "config" in typed else {}
    recipe = typed.get("recipe", from_file.get("recipe"))
    given = (read_recipe(recipe) if recipe else {}) | from_file | typed
    config = Config(**given)
    config.given = frozenset(given)
    check(config, typed)
    return config, args


def given(config: Config) -> frozenset[str]:
    """The flags that were given; of a Config made in a program, those that differ from defaults."""
    if config.given is not None:
        return config.given
    return frozenset(f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default)


def train_parser() -> Parser:
    """The command line of train.py."""
    parser = Parser(
        Config,
        "train.py",
        "[flags]",
        "Fine-tune an encoder with LoRA, in full, or its head alone. With no flags: LoRA on the bundled nano ViT "
        "and generated shapes, under a minute on two CPU cores. Defaults stand in [brackets].",
        "NAME ... may be one value or one for each tower: vision=A text=B. A switch that a recipe has turned on is "
        "turned off by --no-SWITCH.\n\nexamples:\n"
        "  python train.py --task vqa\n"
        "  python train.py --data-dir photos --model vit-tiny-patch16-224 --weights deit_tiny.safetensors\n"
        "  python train.py --recipe imagewoof-vit-tiny --data-dir imagewoof2-320 --dry-run\n"
        "  python train.py --resume runs/classify-lora-000",
    )
    lists = parser.add_argument_group("print and exit")
    lists.add_argument("--list-models", action="store_true", help="the names for --model")
    lists.add_argument("--list-recipes", action="store_true", help="the names for --recipe, with a line on each")
    lists.add_argument("--list-targets", metavar="MODEL", help="the layers of a model that LoRA can adapt")
    return parser


def _add_flag(group, name: str, rule: Rule, default: Any) -> None:
    keep = {"dest": name, "default": argparse.SUPPRESS}
    if rule.kind is bool:
        group.add_argument(option(name), action="store_true", help=rule.help, **keep)
        off = option(f"no_{name}")
        group.add_argument(off, action="store_false", help=argparse.SUPPRESS, **keep)
        return
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    shown = f"{shown:g}" if isinstance(shown, float) else shown
    shown = rule.shown or shown
    text = f"{rule.help} [{shown}]" if shown is not None else rule.help
    text += f" ({', '.join(rule.tasks)})" * (rule.tasks != TASKS and not rule.group.startswith("text"))
    metavar = "|".join(rule.choices) or rule.meta or {int: "N", float: "X"}.get(rule.kind, "NAME")
    several = {"nargs": "+"} if rule.many or rule.towers else {}
    group.add_argument(option(name), metavar=metavar, help=text.replace("%", "%%"), **several, **keep)


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=29, width=100)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Lines with two spaces before them stay as they are: they are commands to copy."""
        paragraphs = (p if p.startswith("  ") else super(_HelpFormatter, self)._fill_text(p, width, indent)
                      for p in text.split("\n"))  # fmt: skip
        return "\n".join(paragraphs)

    def _format_args(self, action, default_metavar):
        return f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)


def check(config: Config, typed: Iterable[str] = ()) -> None:
    """What no flag shows alone: flags of another task or mode, and pairs that exclude each other.

    `typed` names the flags of the command line. There a LoRA flag beside --mode full is a mistake,
    while a recipe's LoRA settings may well be run once in another mode.
    """
    for name, rule in rules(Config).items():
        value = getattr(config, name)
        if value == getattr(Config, name) and (name not in typed or value is False):
            continue
        if config.task not in rule.tasks:
            belongs = " and ".join(f"--task {task}" for task in rule.tasks)
            raise UserError(f"{option(name)} does not apply to --task {config.task}; it belongs to {belongs}")
        if name in typed and name in LORA_FLAGS and config.mode != "lora":
            raise UserError(f"{option(name)} has no effect with --mode {config.mode}; use --mode lora")
        # a run that is resumed may have one
        taught = config.teacher or config.resume not in ("auto", "never")
        if (name in typed or name == "distill_unlabelled") and name.startswith("distill") and not taught:
            raise UserError(f"{option(name)} needs --teacher RUN, the model to learn from")
        if name in typed and config.distill_hard and name in ("distill_temperature", "distill_t2"):
            raise UserError(f"{option(name)} has no effect with --distill-hard, where the best answer counts alone")
    if config.head_lr and config.mode == "linear":
        raise UserError(
            "--head-lr has no effect with --mode linear, where --lr is the head's learning rate; leave it out"
        )
    check_device(config.device)
    half = config.base_dtype not in (None, "fp32")
    if half and config.mode == "full":
        raise UserError("--base-dtype is for frozen weights, but --mode full trains all of them; use --amp alone")
    if half and config.amp not in ("auto", config.base_dtype):
        raise UserError(f"--base-dtype {config.base_dtype} needs --amp {config.base_dtype} or auto, not {config.amp}")
    check_prompt(config.task, config.prompt)
    check_labels(config, given(config))
    if config.subset > 1 and config.subset % 1:
        raise UserError(f"--subset {config.subset} is above 1 and so a number of pictures, which must be whole")
    if config.shots and config.subset != 1:
        raise UserError("--shots and --subset both choose the training pictures; use one of the two")
    if config.steps_per_shot and not config.shots:
        raise UserError("--steps-per-shot counts steps for each picture of a class; it needs --shots K")
    if "unlabelled_share" in typed and not config.distill_unlabelled:
        raise UserError("--unlabelled-share is a share of each batch; it needs --distill-unlabelled DIR")
    if config.steps_per_shot and config.distill_unlabelled:
        raise UserError("--steps-per-shot and --distill-unlabelled both say how long an epoch is; use one of the two")
    if config.steps_per_shot and "max_steps" in typed:
        raise UserError("--max-steps and --steps-per-shot both say when to end; use one of the two")
    if config.cache_features and config.mode != "linear" and config.task != "vqa":
        raise UserError(
            f"--cache-features keeps what a frozen encoder says of each picture, but --mode {config.mode} changes the "
            "encoder in every step; use --mode linear"
        )
    if config.cache_features and config.augment != "none":
        raise UserError(
            f"--cache-features encodes each picture once, but --augment {config.augment} changes it in every epoch; "
            "use --augment none"
        )


def check_labels(config: Config, given: Collection[str]) -> None:
    """Which flags go with --multi-label, --metric and --seeds; `given`: those that were given."""
    metric, resume, several, seeds = config.metric, config.resume, config.multi_label, config.seeds
    of_one_class = {"--metric balanced": metric == "balanced", "--class-weights auto": config.class_weights == "auto"}
    of_one_class |= {"--head names": config.head == "names", "--shots": config.shots, "--teacher": config.teacher}
    if several and (flags := [flag for flag, on in of_one_class.items() if on]):
        raise UserError(f"{flags[0]} reckons with one class for each picture; leave it out beside --multi-label")
    if config.task != "classify" and metric not in (None, "accuracy", "loss"):
        raise UserError(f"--metric {metric} does not apply to --task {config.task}; use accuracy or loss")
    if metric == "map" and not several:
        raise UserError("--metric map is the mean average precision of --multi-label; use accuracy, balanced, f1, loss")
    if seeds and "seed" in given:
        raise UserError("--seed and --seeds both name the seed; use one of the two")
    if seeds and resume != "auto":
        raise UserError(f"--resume {resume} is for one run; --seeds beside the same --output resumes what is left")
    if seeds and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--seeds starts runs of its own; with torchrun start one for each --seed")


def check_prompt(task: str, prompt: str | tuple[str, ...] | None) -> None:
    """UserError for a --prompt without the places that the task fills in."""
    templates = (prompt,) if isinstance(prompt, str) else prompt or ()
    if task == "choice" and len(templates) > 1:
        raise UserError(f"--prompt: --task choice takes one text, got {len(templates)}")
    for text in templates:
        if task == "choice" and not ("{question}" in text and "{choice}" in text):
            raise UserError(f"--prompt must contain {{question}} and {{choice}}, got {text!r}")
        if task == "classify" and text.count("{}") != 1:
            raise UserError(f"--prompt {text!r}: for class names it must contain {{}} once, as in 'a photo of a {{}}.'")


def check_device(device: str) -> None:
    """UserError for what --device cannot be."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}")


def read_toml(path: str | os.PathLike) -> dict[str, Any]:
    """{field: value} of a TOML file or a run's config.toml; errors name the file and the key."""
    content = _load_toml(path)
    of_a_run = content.pop(BASE, None) is not None
    table, values = rules(Config), {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in table or name == "config":
            raise UserError(f"{path}: unknown key {key!r}{close_match(name, table)}")
        values[name] = convert(name, table[name], value, where=f"{path}: {key}")
    return as_meant(values) if of_a_run else values


def as_meant(values: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run's config.toml as they were meant when it was written: version 0.1 did not
    write what it could not choose, and wrote --fusion for every task."""
    task = values.get("task", Config.task)
    if task != "vqa":
        values = {name: value for name, value in values.items() if name != "fusion"}
    return FIRST.get(task, {}) | values


def read_run_config(run_dir: str | os.PathLike) -> tuple[Config, dict[str, Any]]:
    """(configuration, {"weights": ..., "sha256": ...} of the base) of a run directory."""
    path = Path(run_dir) / "config.toml"
    base = _load_toml(path).get(BASE, {}) if path.is_file() else None
    if not isinstance(base, dict):
        inside = sorted(str(file.parent) for file in Path(run_dir).glob("*/config.toml"))
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise UserError(f"{run_dir} is not a run directory of minilora: it has no usable config.toml{hint}")
    for key, value in base.items():
        texts = value.values() if isinstance(value, dict) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: {BASE}.{key} must be a text, or one for each tower")
    config = Config(**read_toml(path))
    if config.model is None:
        raise UserError(f"{path}: the key model is missing")
    return config, base


def _load_toml(path: str | os.PathLike) -> dict[str, Any]:
    path = Path(path) / "config.toml" if Path(path).is_dir() else Path(path)
    text = read_text(path, LONGEST)
    if any(line.count(".") > DOTS for line in text.splitlines()):
        raise UserError(f"{path}: not a TOML file of minilora: more than {DOTS} dots in a line")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None


def recipes() -> dict[str, str]:
    """{recipe name: the first line of its file, which says what it is}."""
    files = sorted(RECIPES.glob("*.toml"))
    return {f.stem: f.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for f in files}


def read_recipe(name: str) -> dict[str, Any]:
    """The flags of a recipe."""
    if name not in recipes():
        raise UserError(f"--recipe {name!r} is unknown{close_match(name, recipes())}; there are {', '.join(recipes())}")
    return read_toml(RECIPES / f"{name}.toml") | {"recipe": name}


def to_toml(config: Config, base: dict[str, Any] | None = None, only: Collection[str] | None = None) -> str:
    """config.toml: every flag that has a value, or of `only`, by group, then the base weights."""
    lines, group = ["# This run; `python train.py --config DIR` (or this file) trains it again."], None
    for name, rule in rules(type(config)).items():
        value = getattr(config, name)
        if value is None or name in NOT_SAVED or (only is not None and name not in only):
            continue
        if rule.group != group:
            lines += ["", f"# {rule.group}"]
            group = rule.group
        lines.append(f"{name} = {_toml_value(value)}")
    if base:
        lines += ["", "# the frozen weights under the adapter, and what they must be", f"[{BASE}]"]
        lines += [f"{key} = {_toml_value(value)}" for key, value in base.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL
        if value != encodable(value):
            raise UserError(
                f"{value}: config.toml cannot hold a name that is not UTF-8; rename it, or name a link to it"
            )
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return repr(value)
