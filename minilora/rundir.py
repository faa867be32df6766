"""Run directories: a new one per run, one that is gone on with, and summary.json at the end.

config.toml names everything that was asked for; a directory is gone on with only by the same configuration.
"""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from minilora.atomic import atomic_write, write_json
from minilora.config import NOT_SAVED, read_run_config, read_toml, to_toml
from minilora.errors import UserError
from minilora.flags import Config
from minilora.training.checkpoint import step_of
from minilora.values import option

ROOT = Path("runs")
FREE = {
    *NOT_SAVED,
    "recipe",
    "workers",
    "device",
    "log_interval",
    "save_every",
    "compile",
}  # may differ on resume


def continued(config: Config) -> tuple[Config, Path | None]:
    """With --resume DIR the configuration of that run, and the checkpoint if DIR is one.

    Flags that were given beside it win, so that `open_run_dir` can say which of them differ.
    """
    if config.resume in ("auto", "never"):
        return config, None
    path = Path(config.resume)
    checkpoint = path if step_of(path) is not None else None
    run_dir = path.parents[1] if checkpoint else path
    if config.output and Path(config.output).resolve() != run_dir.resolve():
        raise UserError(f"--resume {path} goes on in {run_dir}; leave --output out")
    given = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    saved, _ = read_run_config(run_dir)
    return replace(saved, **given | {"output": str(run_dir), "resume": "auto"}), checkpoint


def open_run_dir(config: Config, base: dict[str, Any]) -> Path:
    """The directory of this run with its config.toml: new, or an old one of the same configuration.

    Raises UserError for a directory that holds another run, or other files.
    """
    text = to_toml(config, base)
    if config.output is None:
        path = _numbered(f"{config.task}-{config.mode}")
    else:
        path = Path(config.output)
        if (path / "config.toml").exists():
            _same_configuration(path, config)
            return path
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"--output {path} is not empty and holds no run; choose another folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {path} cannot be made: {error.strerror}") from None
    atomic_write(path / "config.toml", text.encode())
    return path


def _numbered(prefix: str) -> Path:
    """runs/PREFIX-NNN with the first free number; mkdir decides, so that two runs never get the same one."""
    ROOT.mkdir(exist_ok=True)
    for number in range(10_000):
        path = ROOT / f"{prefix}-{number:03d}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
    raise UserError(f"{ROOT}/ holds 10,000 runs of the kind {prefix}; name a folder with --output")


def differences(path: Path, config: Config) -> list[str]:
    """What `config`, resolved, has otherwise than the run in `path`; [] for the same run."""
    there = replace(Config(), **read_toml(path))
    names = [f.name for f in fields(Config) if f.name not in FREE]
    return [
        f"{option(n)} {getattr(there, n)} there, {getattr(config, n)} here"
        for n in names
        if getattr(there, n) != getattr(config, n)
    ]


def _same_configuration(path: Path, config: Config) -> None:
    if other := differences(path, config):
        raise UserError(
            f"{path} holds a run of another configuration ({', '.join(other[:5])}); choose another --output, or go "
            f"on from its weights with --adapter {path}"
        )


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """summary.json: metrics, counts, seconds, versions, weights_sha256, seed."""
    write_json(run_dir / "summary.json", summary)


def size_mb(path: Path) -> float:
    """Size of a file in MB (1e6 bytes)."""
    return os.path.getsize(path) / 1e6
