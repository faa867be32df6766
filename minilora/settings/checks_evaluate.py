"""Which flags of evaluate.py go together, and whether what they name can be written: checked before
any work is done.
"""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from minilora.errors import UserError
from minilora.settings.flags import PICTURE_FLAGS
from minilora.settings.flags_evaluate import EvalConfig
from minilora.settings.parse import check_device
from minilora.settings.values import option

MACHINE = {"device", "amp", "threads", "batch_size", "workers"}  # how it is computed, not what
# of a base model: a run knows its own
BASE_MODEL = {"task", "model", "tokenizer", "image_size", "prompt", *PICTURE_FLAGS}
ZERO_SHOT = BASE_MODEL | MACHINE | {"classes", "weights", "data_dir", "data_format", "split", "bad_data"}
# what `--image` is answered with
PICTURES = MACHINE | {"image", "question", "choices", "classes", "weights"}
OF_ONE_RUN = ("image", "predictions", "submission", "merge_to", "export_adapter")
NEEDS = {"question": ("image",), "choices": ("image",), "per_head": ("attention",)}
NEEDS |= {"classes": ("image", "data_dir")}
NEEDS |= {"layout": ("merge_to", "export_adapter")}


def check(options: EvalConfig, typed: Collection[str], paths: Sequence[str]) -> None:
    """UserError for a flag that would have no effect beside the others, or that names what
    cannot be written.

    `typed` are the fields of `options` that the command line named, `paths` the run directories.
    """
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
