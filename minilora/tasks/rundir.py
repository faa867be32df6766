"""Run directories: a new one for each run, or an old one that is resumed.

config.toml names everything that was asked for; a run is resumed only with the same configuration,
on the same base weights. Data and files that were moved meanwhile are named anew: `--resume RUN
--data-dir NEW`.
"""

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from minilora.atomic import atomic_write
from minilora.data.pictures.parts import nfc
from minilora.errors import UserError
from minilora.settings.flags import PICTURE_FLAGS, Config
from minilora.settings.parse import NOT_SAVED, given, read_run_config, read_toml, to_toml
from minilora.settings.values import option
from minilora.tasks import lock
from minilora.tasks.runfiles import read_labels
from minilora.textfiles import printable
from minilora.training.checkpoint import step_of

ROOT = Path("runs")
# may differ on resume
FREE = {*NOT_SAVED, "recipe", "workers", "device", "log_interval", "log_to", "save_every", "time_limit"}
FREE |= {"keep_checkpoints", "compile", "threads", "deterministic"}
LIMITS = ("epochs", "max_steps")  # may grow with --resume RUN
# what belongs to a model, and is taken over with --adapter RUN
OF_MODEL = ("model", "weights", "tokenizer", "image_size", *PICTURE_FLAGS, "head", "fusion", "text_pooling", "prompt")
# may be another path where the old one is gone
PLACES = ("data_dir", "weights", "tokenizer", "teacher", "distill_unlabelled")


def continued(config: Config) -> tuple[Config, Path | None]:
    """(configuration, checkpoint or None); with --resume DIR those of that run. Flags given beside
    it win, so that `open_run_dir` can say which of them differ."""
    if config.resume in ("auto", "never"):
        return like_adapter(config), None
    path = Path(config.resume)
    checkpoint = path if step_of(path) is not None else None
    run_dir = path.parents[1] if checkpoint else path
    if config.output and Path(config.output).resolve() != run_dir.resolve():
        raise UserError(f"--resume {path} continues in {run_dir}; leave --output out")
    saved, _ = read_run_config(run_dir)
    names = given(config) - {"config", "output", "resume"}
    resumed = replace(saved, **{name: getattr(config, name) for name in names}, output=str(run_dir), resume="auto")
    resumed.given = names
    # 0 steps are no limit
    resumed.longer = tuple(n for n in LIMITS if (getattr(resumed, n) or math.inf) > (getattr(saved, n) or math.inf))
    return resumed, checkpoint


def like_adapter(config: Config) -> Config:
    """With --adapter RUN the model that the run was trained on, unless --model says another;
    UserError for a run of another task. A folder that is no run says nothing of it."""
    if not config.adapter or not (Path(config.adapter) / "config.toml").is_file():
        return config
    saved, base = read_run_config(config.adapter)
    if saved.task != config.task:
        raise UserError(f"--adapter {config.adapter} is a run of --task {saved.task}; this one is --task {config.task}")
    typed, known = given(config), {name: getattr(saved, name) for name in OF_MODEL}
    known["weights"] = base.get("weights", saved.weights)
    made = replace(config, **{n: value for n, value in known.items() if n not in typed and "model" not in typed})
    made.given = typed
    return made


def open_run_dir(config: Config, base: dict[str, Any], labels: Sequence[str] = ()) -> Path:
    """The directory of this run with its config.toml: new, or an old one of the same configuration.

    `base` records the base weights, `labels` are the classes of the data. The directory is locked
    until lock.release(). Raises UserError for one that holds another run, or other files, and where
    another process trains there.
    """
    prefix, text = f"{config.task}-{config.mode}", to_toml(config, base) + launch_mark()
    path = Path(config.output) if config.output else _restarted(prefix) or _numbered(prefix)
    if (path / "config.toml").exists():
        renamed = _same_run(path, config, base, labels)
        _lock(path)
        if renamed:
            atomic_write(path / "config.toml", text)
        return path
    if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - {lock.FILE}):
        if lock.at_work(path):  # another process, at its first files
            _lock(path)  # says so
        raise UserError(f"--output {path} is not empty and holds no run; choose another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} cannot be made: {error.strerror}") from None
    _lock(path)
    atomic_write(path / "config.toml", text)
    return path


def _lock(path: Path) -> None:
    if line := lock.take(path):
        print(printable(line))


def _numbered(prefix: str) -> Path:
    """runs/PREFIX-NNN with the first free number; mkdir never gives it to two runs."""
    ROOT.mkdir(exist_ok=True)
    for number in range(10_000):
        path = ROOT / f"{prefix}-{number:03d}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
    raise UserError(f"{ROOT}/ holds 10,000 runs of the kind {prefix}; name a folder with --output")


def launch_mark() -> str:
    """A comment for config.toml that all starts of one `torchrun --max-restarts N` share, or ""."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return ""
    return f"# torchrun {os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}\n"


def _restarted(prefix: str) -> Path | None:
    """The numbered directory that an earlier start of this launch opened."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    mark = launch_mark().encode()
    files = sorted(ROOT.glob(f"{prefix}-*/config.toml"), reverse=True)
    return next((file.parent for file in files if file.read_bytes().endswith(b"\n" + mark)), None)


def differences(path: Path, config: Config) -> list[str]:
    """Where `config`, resolved, differs from that of the run in `path`; [] for the same run."""
    there = replace(Config(), **read_toml(path))
    both = ((f.name, getattr(there, f.name), getattr(config, f.name)) for f in fields(Config) if f.name not in FREE)
    return [f"{option(name)} {old} there, {new} here" for name, old, new in both if old != new]


def _same_run(path: Path, config: Config, base: dict[str, Any], labels: Sequence[str]) -> bool:
    """Whether config.toml is to be written anew; UserError where `path` holds another run."""
    saved, recorded = read_run_config(path)
    moved = [name for name in PLACES if _moved(getattr(saved, name), getattr(config, name))]
    as_before = {name: getattr(saved, name) for name in (*moved, *config.longer)}
    if other := differences(path, replace(config, **as_before)):
        raise UserError(
            f"{path} holds a run of another configuration ({', '.join(other[:5])}); choose another --output, or go "
            f"on from its weights with --adapter {path}"
        )
    if recorded.get("sha256") not in (None, base.get("sha256")):
        raise UserError(
            f"{path}: the base weights {base.get('weights')} are not those that this run began with (their sha256 "
            "differs); bring those back, or choose another --output"
        )
    known, file = labels, path / "labels.json"
    # a run that was stopped early has no labels yet; damaged ones are written anew
    if config.resume != "never" and file.is_file() and not file.is_symlink():
        with contextlib.suppress(UserError):
            known = read_labels(path)[0]
    if [*map(nfc, known)] != [*map(nfc, labels)]:
        raise UserError(
            f"--data-dir {config.data_dir} has other classes than the data that {path} began with; "
            "choose another --output"
        )
    return bool(moved or config.longer)


def _moved(there: Any, here: Any) -> bool:
    """Whether every path of one value is gone and another is given instead."""
    paths = there.values() if isinstance(there, dict) else [there]
    return None not in (there, here) and there != here and not any(map(os.path.exists, paths))
