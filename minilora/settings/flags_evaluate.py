"""The flags of evaluate.py, as flags.py has those of train.py; which of them go together, and
whether what they name can be written."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import UserError
from minilora.settings.flags import AMP, FILTERS, FORMATS, LAYOUTS, PICTURE_FLAGS, TASKS, flag
from minilora.settings.parse import Parser, check_device
from minilora.settings.values import option

D, O, C, P, X, B = "data", "output", "compression", "one picture", "export", "a base model, without a run"


# fmt: off
@dataclass
class EvalConfig:
    """Everything that one can ask of evaluate.py besides the run directories."""

    data_dir: str = flag(D, None, "folder or table; without labels: predictions only", meta="DIR", shown="the run's")
    data_format: str = flag(D, "auto", "how the data lies on the disk", choices=FORMATS)
    split: str = flag(D, None, "which part", choices=("train", "val", "test"), shown="val")
    bad_data: str = flag(D, "skip", "a broken picture ends the run, or gets an empty row", choices=("error", "skip"))
    batch_size: int = flag(D, None, "pictures at once", int, low=1, shown="as in the validation of the run")
    workers: int = flag(D, 0, "processes that read pictures", int, low=0, high=64)
    device: str = flag(D, "auto", "auto, cpu, cuda or cuda:N", meta="NAME")
    amp: str = flag(D, None, "precision", choices=AMP[1:], shown="as in the training")
    threads: int = flag(D, None, "CPU threads", int, low=1, high=1024, shown="OMP_NUM_THREADS, or the cores there are")
    weights: Any = flag(D, None, "where the base weights are now", towers=True, meta="PATH", shown="as in the run")

    classes: Any = flag(D, None, "other class names, for --head names and zero-shot", many=True, tasks=("classify",),
        meta="TEXT", shown="the run's")

    predictions: str = flag(O, None, "a row per picture: file,label,probability and the next four", meta="FILE.csv")
    submission: str = flag(O, None, "answers alone: a table in FILE.csv, the data set's results in FILE.json",
        meta="FILE")
    report: str = flag(O, None, "one self-contained page; several runs: side by side", meta="FILE.html")
    attention: int = flag(O, None, "attention maps of N pictures, base and runs, in RUN/evaluation/", int, low=0,
        high=64, shown="none; 4 on a page")
    per_head: bool = flag(O, False, "attention maps of each head too", bool)
    spectrum: bool = flag(O, False, "what the updates are like: norms, singular values, rank", bool)
    latency: bool = flag(O, False, "seconds per forward pass, batch 1 and 32", bool)

    prune: float = flag(C, None, "set this share of weights to zero, show sizes side by side", float, low=0, below=1)
    prune_scope: str = flag(C, "backbone", "which weights; units: whole MLP units, really smaller and faster",
        choices=("conv", "backbone", "all", "units"))
    prune_epochs: int = flag(C, 0, "train for N epochs while pruning; with units: LoRA, then merged", int, low=0)

    image: Any = flag(P, None, "answers for these pictures", many=True, meta="FILE")
    question: str = flag(P, None, "the question about --image", meta="TEXT", tasks=("vqa", "choice"))
    choices: Any = flag(P, None, "the answers to choose from", many=True, meta="TEXT", tasks=("choice",))

    merge_to: str = flag(X, None, "write the model with the adapter merged into it", meta="DIR")
    export_adapter: str = flag(X, None, "write the adapter with another library's names, for PEFT", meta="DIR")
    layout: str = flag(X, "transformers", "for --merge-to and --export-adapter", choices=LAYOUTS)

    task: str = flag(B, "classify", "what to score", choices=TASKS)
    model: Any = flag(B, None, "a name of train.py --list-models, or a folder", towers=True, meta="NAME")
    tokenizer: str = flag(B, None, "vocabulary", meta="PATH")
    image_size: int = flag(B, None, "side in pixels", int, low=8, high=2048, shown="as the model was trained")
    mean: Any = flag(B, None, "as for train.py, and so the next four", float, many=True, low=-1000, high=1000, meta="X")
    std: Any = flag(B, None, "deviation of the three colours", float, many=True, above=0, high=1000, meta="X")
    interpolation: str = flag(B, None, "filter for resizing", choices=FILTERS)
    resize: str = flag(B, None, "squash the picture, or crop what is longer", choices=("squash", "crop"))
    crop_pct: float = flag(B, None, "share of the resized picture whose middle is taken", float, above=0, high=1)
    prompt: Any = flag(B, None, "how a choice or class becomes a sentence", many=True, tasks=("classify", "choice"),
        meta="TEXT")
# fmt: on

MACHINE = {"device", "amp", "threads", "batch_size", "workers"}  # how it is computed, not what
# of a base model: a run knows its own
BASE_MODEL = {"task", "model", "tokenizer", "image_size", "prompt", *PICTURE_FLAGS}
ZERO_SHOT = BASE_MODEL | MACHINE | {"classes", "weights", "data_dir", "data_format", "split", "bad_data"}
# what `--image` is answered with
PICTURES = MACHINE | {"image", "question", "choices", "classes", "weights"}
OF_ONE_RUN = ("image", "predictions", "submission", "merge_to", "export_adapter")
NEEDS = {"question": ("image",), "choices": ("image",), "classes": ("image", "data_dir")}
NEEDS |= {"per_head": ("attention",), "layout": ("merge_to", "export_adapter")}


def evaluate_parser(about: str) -> Parser:
    """The command line of evaluate.py; `about`: its docstring, a title and examples."""
    title, _, examples = about.partition("\n\n")
    examples = "examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines())
    parser = Parser(EvalConfig, "evaluate.py", "RUN ... [flags]", title, examples)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run directories; several are compared")
    return parser


def check(options: EvalConfig, typed: Collection[str], paths: Sequence[str]) -> None:
    """UserError for a flag without effect beside the others, or that names what cannot be written.
    `typed`: the fields of `options` that the command line named, `paths`: the run directories."""
    check_device(options.device)
    runs = len(paths)
    if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise UserError(f"{twice[0]} is named twice; compare different runs")
    for name in typed:
        if not runs and name not in ZERO_SHOT:
            raise UserError(f"{option(name)} needs a run directory: evaluate.py RUN {option(name)} ...")
        if runs and name in BASE_MODEL:
            raise UserError(f"{option(name)} is for a base model without a run; the run knows its own")
        if options.image and name not in PICTURES:
            raise UserError(f"{option(name)} has no effect beside --image; leave one of the two out")
        if name in NEEDS and not any(getattr(options, needed) for needed in NEEDS[name]):
            raise UserError(f"{option(name)} needs {' or '.join(map(option, NEEDS[name]))}")
        if runs > 1 and name in OF_ONE_RUN:
            raise UserError(f"{option(name)} takes one run, but {runs} are named")
    for name in ("predictions", "submission", "report"):
        if getattr(options, name):
            _writable(option(name), Path(getattr(options, name)))
    for name in ("merge_to", "export_adapter"):
        if getattr(options, name):
            _new_folder(option(name), Path(getattr(options, name)))


def _writable(flag: str, path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{flag} {path}: the folder {path.parent} cannot be written to; name another")


def _new_folder(flag: str, path: Path) -> None:
    """A model may replace a model that was exported before, but no run and nobody's other files."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{flag} {path}: is a file; name a folder")
    if (path / "config.toml").exists():
        raise UserError(f"{flag} {path}: is a run, whose own files would be replaced; name another folder")
    if path.is_dir() and any(path.iterdir()) and not any(path.glob("*.safetensors")):
        raise UserError(f"{flag} {path}: holds other files than a model's; name another folder")
