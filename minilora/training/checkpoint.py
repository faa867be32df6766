"""Checkpoints: run/checkpoints/step-N/ = state.safetensors + state.json + manifest.json. No
pickle anywhere.

state.safetensors  model.<name>: trainable tensors and persistent buffers; best.<name>: those of the
                   best epoch; optim.<name>.<key>: the optimizer's memory
state.json         TrainState and the scaler: step, epoch, position in it, plateau, history, best
manifest.json      sha256 of the two others, written last

The directory is filled under a temporary name and renamed when everything is on the disk: a
checkpoint is either whole or not there. One whose manifest does not agree with its files, byte by
byte, does not exist.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minilora.atomic import atomic_write, file_sha256, sync_directory, write_safetensors
from minilora.errors import RunError, UserError
from minilora.training.distributed import gather_objects, is_main
from minilora.training.state import portable

FOLDER = "checkpoints"
FILES = ("state.safetensors", "state.json")
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"


def manifest_bytes(directory: Path) -> bytes:
    """The manifest of these files; compared as bytes, so that a flipped bit in itself shows too."""
    digests = {name: file_sha256(directory / name) for name in FILES}
    return (json.dumps({"format": 1, "sha256": digests}, indent=2) + "\n").encode()


def step_of(directory: Path) -> int | None:
    """N of a directory named step-N, None for any other name."""
    match = re.fullmatch("step-(0|[1-9][0-9]*)", directory.name)
    return int(match[1]) if match else None


def directory_of(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return Path(run_dir) / FOLDER / f"step-{step}"


def checkpoint_dirs(run_dir: str | Path) -> list[Path]:
    """Every step-N directory of a run, newest first, valid or not."""
    folder = Path(run_dir) / FOLDER
    found = [d for d in folder.iterdir() if step_of(d) is not None and d.is_dir()] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def why_invalid(directory: Path) -> str | None:
    """None for a valid checkpoint, else what is wrong with it."""
    for name in (*FILES, MANIFEST):
        if not (directory / name).is_file():
            return f"{name} is missing"
    try:
        if (directory / MANIFEST).read_bytes() != manifest_bytes(directory):
            return f"its files do not agree with {MANIFEST}"
        if json.loads((directory / "state.json").read_text())["step"] != step_of(directory):
            return "it was renamed"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"it cannot be read: {error}"
    return None


def latest_checkpoint(run_dir: str | Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest valid checkpoint of a run, or None; `log` gets the reason why one is skipped."""
    for directory in checkpoint_dirs(run_dir):
        reason = why_invalid(directory)
        if reason is None:
            return directory
        log(f"checkpoint {directory} is skipped: {reason}")
    return None


def save_checkpoint(run_dir: str | Path, tensors: dict[str, Tensor], state: dict, keep_last: int = 2) -> Path:
    """Writes step-N (N = state["step"]), removes all but the newest `keep_last`; returns its path.

    One of the same step is replaced: it was written before the validation, this one knows the
    score. RunError when the disk is full; older ones are untouched and nothing half-made stays.
    """
    final = directory_of(run_dir, state["step"])
    folder, temporary, old = final.parent, final.parent / f"{TEMPORARY}{final.name}", final.parent / f"{TEMPORARY}old"
    try:
        remove_leftovers(run_dir)
        temporary.mkdir(parents=True)
        write_safetensors(temporary / FILES[0], {name: portable(t) for name, t in tensors.items()})
        atomic_write(temporary / FILES[1], json.dumps(state, indent=1).encode())
        atomic_write(temporary / MANIFEST, manifest_bytes(temporary))
        if os.path.lexists(final):
            os.replace(final, old)  # killed here, `recover` puts the new one in its place
        os.replace(temporary, final)
        sync_directory(folder)
        remove(old)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        todo = "Make space" if full else "See to it that nothing else writes there"
        raise RunError(
            f"checkpoint {final} could not be written: {error.strerror or error}; older ones are intact. "
            f"{todo} and start the same command again"
        ) from error
    finally:
        remove(temporary)
    for directory in checkpoint_dirs(run_dir)[max(1, keep_last) :]:
        remove(directory)
    return final


def load_checkpoint(directory: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of a checkpoint; UserError where its manifest does not hold."""
    reason = why_invalid(directory)
    if reason is None:
        try:
            return load_file(directory / FILES[0]), json.loads((directory / FILES[1]).read_text())
        except SafetensorError as error:
            reason = str(error)
    raise UserError(f"checkpoint {directory} is not valid: {reason}; --resume RUN takes the newest that is")


def choose(run_dir: str | Path, resume: str, log: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from, as `find` has it; rank 0 decides for all. Those of `run_dir`
    that are newer, or of a training that is not resumed, are removed: they would be mistaken for
    the future of this one."""
    chosen = None
    if is_main():
        recover(run_dir)
        chosen = find(run_dir, resume, log)
        ours = chosen is not None and chosen.resolve().parent == (Path(run_dir) / FOLDER).resolve()
        for directory in checkpoint_dirs(run_dir):
            if not ours or step_of(directory) > step_of(chosen):
                remove(directory)
        remove_leftovers(run_dir)
        chosen = directory_of(run_dir, step_of(chosen)) if ours else chosen
    return gather_objects(chosen)[0]


def find(run_dir: str | Path, resume: str, log: Callable[[str], None]) -> Path | None:
    """The checkpoint that --resume means: "auto" the run's newest valid one, "never" none, else a
    directory's own or newest; None to start afresh."""
    if resume in ("auto", "never"):
        return latest_checkpoint(run_dir, log) if resume == "auto" else None
    directory = Path(resume)
    chosen = directory if step_of(directory) is not None else latest_checkpoint(directory, log)
    if chosen is None:
        raise UserError(f"--resume {resume}: no valid checkpoint there; start the run anew, with another --output")
    return chosen


def recover(run_dir: str | Path) -> None:
    """A checkpoint that a killed process had whole, manifest and all, gets its name."""
    for torso in (Path(run_dir) / FOLDER).glob(f"{TEMPORARY}step-*"):
        final = torso.with_name(torso.name.removeprefix(TEMPORARY))
        if (torso / MANIFEST).is_file() and not os.path.lexists(final):
            os.replace(torso, final)


def remove_leftovers(run_dir: str | Path) -> None:
    """Removes what a killed process left half-made, here and in the run directory itself."""
    for torso in Path(run_dir).glob(".*.tmp"):
        if re.fullmatch(r"\..+\.[0-9]+\.tmp", torso.name) and torso.is_file():  # atomic.py's
            remove(torso)
    for torso in (Path(run_dir) / FOLDER).glob(f"{TEMPORARY}*"):
        remove(torso)


def remove(path: Path) -> None:
    """Away with a folder and all that is in it, or with a file, a link, a pipe."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
