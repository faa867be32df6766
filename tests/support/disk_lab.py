"""A disk that is nearly full, for test_reliability.py.

    unshare -m python -m tests.support.disk_lab FOLDER KIB ...

For each KIB mounts a small tmpfs below FOLDER, seen by this process alone, stops a run on it, leaves so much room and
starts the run again; then makes room and starts it once more.
The last line printed is the findings as JSON.
"""

import contextlib
import ctypes
import io
import json
import shutil
import sys
from pathlib import Path

from minilora.atomic import file_sha256
from minilora.errors import UserError
from minilora.settings import exit_codes as cli
from minilora.signals import Interrupted
from minilora.training import checkpoint
from minilora.training.trainer import Trainer
from reference_models import ModelError
from tests.support.tiny_tasks import bits, train, write_tasks

DISK = 512 * 1024


def mount(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    c = ctypes.CDLL(None, use_errno=True)
    if c.mount(b"minilora-test", bytes(folder), b"tmpfs", 0, f"size={DISK}".encode()):
        raise OSError(ctypes.get_errno(), f"tmpfs cannot be mounted on {folder}")


def program(words) -> tuple[int, str]:
    """(exit code, stderr) of `python train.py WORDS`."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.run(lambda _: train.main([str(word) for word in words]), (UserError, ModelError))
        except SystemExit as error:
            code = error.code
    return code, said.getvalue()


def stopped_at(step: int, words) -> None:
    taken = Trainer.train_step

    def train_step(self, *args):
        stop = taken(self, *args)
        return stop or self.state.step + 1 == step

    Trainer.train_step = train_step
    try:
        assert program(words)[0] == Interrupted(15).code
    finally:
        Trainer.train_step = taken


def files_of(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def starve(words, disk: Path, room: int) -> None:
    """Fills the disk so that `room` KiB are left."""
    free = shutil.disk_usage(disk).free
    with contextlib.suppress(OSError), open(disk / "filler", "wb") as file:
        file.write(b"\1" * max(free - 1024 * room, 0))
        file.flush()


def main(folder: Path, rooms: list[int]) -> dict:
    words = [*write_tasks(folder)["classify"], "--epochs", "2", "--save-every", "1", "--lr", "0.01"]
    program([*words, "--output", folder / "whole"])
    whole, findings = bits(folder / "whole"), {"codes": [], "messages": [], "complaints": []}
    for number, room in enumerate(rooms):
        disk = folder / f"disk-{number}"
        mount(disk)
        run = disk / "run"
        stopped_at(3, [*words, "--output", run])
        before = files_of(run)
        starve(words, disk, room)
        code, said = program([*words, "--output", run])
        (disk / "filler").unlink()
        findings["codes"].append(code)
        findings["messages"].append(said)
        after = files_of(run)
        newer = checkpoint.latest_checkpoint(run, lambda line: None).name != "step-3"
        lost = [] if newer else [name for name in before if before[name] != after.get(name) and name != "train.log"]
        findings["complaints"] += [f"{room} KiB left: lost {name}" for name in lost]
        torsos = [name for name in after if ".tmp" in name]
        unread = [d.name for d in checkpoint.checkpoint_dirs(run) if checkpoint.why_invalid(d)]
        findings["complaints"] += [f"{room} KiB left: torso {name}" for name in (*torsos, *unread)]
        code, said = program([*words, "--output", run])
        if code or bits(run)["weights"] != whole["weights"] or bits(run)["rows"] != whole["rows"]:
            findings["complaints"].append(f"{room} KiB left: later {code} {said}")
    return findings


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]])))
