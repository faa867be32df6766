"""minilora/training/checkpoint.py: what is not exactly what was written does not exist."""

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minilora.errors import RunError, UserError
from minilora.training import checkpoint, state


def tiny(step: int) -> tuple[dict, dict]:
    return {"model.w": torch.full((2,), float(step))}, {"step": step, "epoch": 1}


@pytest.fixture
def run(tmp_path):
    """A run directory with checkpoints of steps 4 and 8."""
    for step in (4, 8):
        checkpoint.save_checkpoint(tmp_path, *tiny(step))
    return tmp_path


def test_what_was_saved_last_is_loaded_with_the_same_tensors_and_values(run):
    newest = checkpoint.latest_checkpoint(run)
    assert newest == run / "checkpoints" / "step-8"
    assert sorted(p.name for p in newest.iterdir()) == ["manifest.json", "state.json", "state.safetensors"]
    tensors, values = checkpoint.load_checkpoint(newest)
    assert torch.equal(tensors["model.w"], torch.tensor([8.0, 8.0])) and values == {"step": 8, "epoch": 1}


def test_every_flipped_bit_is_noticed(run):
    newest = run / "checkpoints" / "step-8"
    tried = 0
    for path in sorted(newest.iterdir()):
        good = path.read_bytes()
        for position in range(len(good)):
            for bit in range(8):
                bad = bytearray(good)
                bad[position] ^= 1 << bit
                path.write_bytes(bad)
                assert checkpoint.why_invalid(newest) is not None, f"{path.name} byte {position} bit {bit}"
                tried += 1
        path.write_bytes(good)
        assert checkpoint.why_invalid(newest) is None
    assert tried > 1000


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_truncated_missing_or_longer_files_are_passed_over_with_one_line(run, name):
    newest = run / "checkpoints" / "step-8"
    good = (newest / name).read_bytes()
    for bad in (*(good[:n] for n in range(0, len(good), 17)), good + b"\0", None):
        (newest / name).unlink()
        if bad is not None:
            (newest / name).write_bytes(bad)
        lines = []
        assert checkpoint.latest_checkpoint(run, lines.append).name == "step-4"
        assert len(lines) == 1 and "step-8 is skipped" in lines[0]
        (newest / name).write_bytes(good)
    with pytest.raises(UserError, match="no valid checkpoint"):
        shutil.rmtree(run / "checkpoints")
        checkpoint.find(run, str(run), print)


def test_swapped_files_and_renamed_directories_are_noticed(run):
    folder = run / "checkpoints"
    for name in checkpoint.FILES:
        shutil.copy(folder / "step-8" / name, folder / "copy")
        shutil.copy(folder / "step-4" / name, folder / "step-8" / name)
        assert "do not agree" in checkpoint.why_invalid(folder / "step-8")
        shutil.copy(folder / "copy", folder / "step-8" / name)
    shutil.copytree(folder / "step-4", folder / "step-12")
    assert checkpoint.why_invalid(folder / "step-12") == "it was renamed"
    assert checkpoint.latest_checkpoint(run, lambda line: None).name == "step-8"


def test_a_consistent_manifest_does_not_make_nonsense_loadable(run):
    newest = run / "checkpoints" / "step-8"
    for name, nonsense in (("state.safetensors", b"\xff" * 64), ("state.json", b"[]"), ("state.json", b"{")):
        good = (newest / name).read_bytes()
        (newest / name).write_bytes(nonsense)
        (newest / "manifest.json").write_bytes(checkpoint.manifest_bytes(newest))
        with pytest.raises(UserError, match="not valid"):
            checkpoint.load_checkpoint(newest)
        (newest / name).write_bytes(good)


def test_keep_last_never_deletes_the_last_good_one(run):
    for step in (10, 12, 14):
        checkpoint.save_checkpoint(run, *tiny(step), keep_last=2)
    names = [d.name for d in checkpoint.checkpoint_dirs(run)]
    assert names == ["step-14", "step-12"], "sorted as numbers, not as words"
    (run / "checkpoints" / "step-14" / "state.json").write_text("{}")
    checkpoint.save_checkpoint(run, *tiny(16), keep_last=1)
    assert checkpoint.latest_checkpoint(run, print).name == "step-16"
    checkpoint.save_checkpoint(run, *tiny(18), keep_last=0)
    assert checkpoint.latest_checkpoint(run, print).name == "step-18"


def test_a_broken_checkpoint_of_the_same_step_is_replaced(run):
    (run / "checkpoints" / "step-8" / "state.json").unlink()
    checkpoint.save_checkpoint(run, *tiny(8))
    assert checkpoint.latest_checkpoint(run).name == "step-8"


def test_going_back_removes_the_future_and_leftovers(run):
    (run / "checkpoints" / "step-8" / "manifest.json").unlink()
    (run / "checkpoints" / ".tmp-step-9").mkdir()
    (run / ".metrics.jsonl.123.tmp").write_text("half a li")
    assert checkpoint.choose(run, "auto", lambda line: None).name == "step-4"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-4"]
    assert not list(run.glob(".*"))
    assert checkpoint.choose(run, "never", print) is None and not checkpoint.checkpoint_dirs(run)


def test_a_write_that_fails_leaves_the_old_checkpoints_and_no_torso(run, monkeypatch):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    def full(*args):
        raise OSError(28, "No space left on device")

    for name in ("os.fsync", "os.replace", "os.mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(RunError, match="(?i)no space left"):
                checkpoint.save_checkpoint(run, *tiny(12))
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, name
    assert checkpoint.save_checkpoint(run, *tiny(12)).name == "step-12"


def test_no_pickle_is_ever_read(run):
    newest = run / "checkpoints" / "step-8"
    (newest / "optimizer.pt").write_bytes(b"\x80\x04cos\nsystem\n")
    checkpoint.load_checkpoint(newest)
    source = "".join(p.read_text() for p in checkpoint.Path(checkpoint.__file__).parent.glob("*.py"))
    assert "torch.load" not in source and "import pickle" not in source


def test_model_tensors_are_the_trainable_ones_and_buffers_and_load_strictly():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    model[2].weight = torch.nn.Parameter(torch.ones(2, 3))
    names = ["1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked", "2.weight", "2.bias"]
    own = {n: state.portable(t) for n, t in state.model_tensors(model).items()}
    assert list(own) == names
    state.load_model_tensors(model, own, "here")
    wrong = {**own, "2.bias": torch.zeros(5), "extra": torch.zeros(1)}
    del wrong["1.weight"]
    with pytest.raises(UserError, match=r"missing 1.weight; unexpected extra; 2.bias is \(5,\), the model has \(2,\)"):
        state.load_model_tensors(model, wrong, "here")


def test_digest_tells_names_and_bits_apart(tmp_path):
    a = {"x": torch.tensor([0.0, 1.0]), "y": torch.tensor(2)}
    assert state.tensors_sha256(a) == state.tensors_sha256(dict(reversed(a.items())))
    others = ({"x": torch.tensor([-0.0, 1.0]), "y": a["y"]}, {"z": a["x"], "y": a["y"]}, {"x": a["x"]})
    assert len({state.tensors_sha256(t) for t in (a, *others)}) == 4
    save_file({"x": torch.tensor([float("nan")])}, tmp_path / "nan.safetensors")
    with pytest.raises(RunError, match="x holds NaN"):
        state.refuse_nonfinite({"x": torch.tensor([float("nan")])}, "the adapter")


def test_state_json_is_plain_json_with_the_step(run):
    values = json.loads((run / "checkpoints" / "step-8" / "state.json").read_text())
    assert values["step"] == 8


def odd(path, kind):
    """Something that is no checkpoint, at `path`."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as one:
            one.bind(str(path))
    elif kind == "link":
        os.symlink("/etc", path)
    elif kind == "folder":
        path.mkdir()
        os.mkfifo(path / "state.json")
    else:
        path.write_text("x")


@pytest.mark.parametrize("kind", ["fifo", "socket", "link", "folder", "file"])
@pytest.mark.parametrize("name", ["step-8", "step-9", "step-102", ".tmp-step-9", ".tmp-old", "step-007", "notes"])
def test_odd_entries_are_no_checkpoints_and_stop_nothing(run, monkeypatch, kind, name):
    """In checkpoints/ and, as torsos, in the run itself; nothing waits for a pipe, and no good checkpoint goes."""
    monkeypatch.chdir(run)  # the name of a socket may not be long
    folder = run / "checkpoints"
    if name == "step-8":
        checkpoint.remove(folder / name)
    odd(Path("checkpoints") / name, kind)
    for torso in (".dir.tmp", ".a.17.tmp"):
        odd(Path(torso), "folder")
    assert checkpoint.choose(run, "auto", lambda line: None).name == ("step-4" if name == "step-8" else "step-8")
    for step in (9, 102):
        checkpoint.save_checkpoint(run, *tiny(step))
    assert checkpoint.latest_checkpoint(run).name == "step-102"
    assert [d.name for d in checkpoint.checkpoint_dirs(run)][:2] == ["step-102", "step-9"]
    assert (run / ".dir.tmp").is_dir() and (run / ".a.17.tmp").is_dir(), "they are not ours"


def test_a_checkpoint_of_the_same_step_is_replaced_and_never_missing(run, monkeypatch):
    """Killed between the two renames, the next start finds the new one."""
    tensors, values = tiny(8)
    checkpoint.save_checkpoint(run, tensors, values | {"epoch": 2})
    assert checkpoint.load_checkpoint(checkpoint.latest_checkpoint(run))[1]["epoch"] == 2
    replace, calls = os.replace, []

    def killed(source, target):
        if str(source).endswith(".tmp-step-8"):
            calls.append(target)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(checkpoint, "remove", lambda path: None)  # as a SIGKILL would leave it
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(run, tensors, values | {"epoch": 3})
    monkeypatch.undo()
    assert not (run / "checkpoints" / "step-8").exists() and calls
    chosen = checkpoint.choose(run, "auto", print)
    assert chosen.name == "step-8" and checkpoint.load_checkpoint(chosen)[1]["epoch"] == 3
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-4", "step-8"]


def test_a_folder_that_goes_away_while_it_is_written_is_no_matter_of_space(run, monkeypatch):
    replace = os.replace

    def vanished(source, target):
        shutil.rmtree(run / "checkpoints")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", vanished)
    with pytest.raises(RunError) as caught:
        checkpoint.save_checkpoint(run, *tiny(9))
    assert "No such file" in str(caught.value) and "space" not in str(caught.value)
