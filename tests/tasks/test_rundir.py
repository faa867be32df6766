"""Run directories whose config.toml points elsewhere, that hold links, or that torchrun starts again."""

import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from minilora.errors import RunError, UserError
from minilora.settings.flags import Config
from minilora.settings.parse import read_toml
from minilora.signals import Interrupted
from minilora.tasks import rundir
from reference_models import create_model, save_pretrained
from tests.support.cli_data import QUICK, write_photos
from tests.support.tiny_tasks import bits, run_quickly, train
from tests.tasks.test_resume import stop_after

BASE = {"weights": "none", "sha256": "00"}


@pytest.fixture
def world(tmp_path):
    """Photos, base weights, and the flags that use them."""
    write_photos(tmp_path / "photos")
    save_pretrained(create_model("vit-nano-patch8-48", num_classes=5), tmp_path / "base")
    words = [*QUICK, "--weights", tmp_path / "base", "--data-dir", tmp_path / "photos"]
    return tmp_path, words


def stopped(words, run, monkeypatch, step=2):
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(Interrupted):
            run_quickly([*words, "--output", run], patch)
    return run


def test_a_run_whose_data_and_weights_were_moved_goes_on_to_the_same_bits(world, monkeypatch):
    root, words = world
    run_quickly([*words, "--output", root / "whole"], monkeypatch)
    run = stopped(words, root / "run", monkeypatch)
    (root / "photos").rename(root / "photos, moved")
    (root / "base").rename(root / "base, moved")
    with pytest.raises(UserError, match="photos: no such folder or file; if it was moved, name its new place"):
        train.main(["--resume", str(run)])
    places = ["--data-dir", root / "photos, moved", "--weights", root / "base, moved"]
    run_quickly(["--resume", run, *places], monkeypatch)
    assert bits(run) == bits(root / "whole")
    saved = read_toml(run)  # and evaluate.py finds them
    assert (saved["data_dir"], saved["weights"]) == (str(places[1]), str(places[3]))


def test_other_data_and_other_weights_are_not_taken_for_moved_ones(world, monkeypatch):
    root, words = world
    run = stopped(words, root / "run", monkeypatch)
    copy = shutil.copytree(root / "photos", root / "copy")
    with pytest.raises(UserError, match="another configuration"):  # the old ones are still there
        train.main(["--resume", str(run), "--data-dir", str(copy)])
    (root / "photos").rename(root / "gone")
    (copy / "train/class_0").rename(copy / "train/wolf")
    (copy / "val/class_0").rename(copy / "val/wolf")
    with pytest.raises(UserError, match="has other classes than the data that"):
        train.main(["--resume", str(run), "--data-dir", str(copy)])
    (root / "gone").rename(root / "photos")
    tensors = load_file(root / "base/model.safetensors")
    tensors["norm.weight"] += 1
    save_file(tensors, root / "base/model.safetensors")
    with pytest.raises(UserError, match="are not those that this run began with"):
        train.main(["--resume", str(run)])


def test_output_and_resume_in_a_config_do_not_lead_a_resumed_run_elsewhere(world, monkeypatch):
    root, words = world
    run = stopped(words, root / "run", monkeypatch)
    text = (run / "config.toml").read_text()
    elsewhere = f'output = "{root / "elsewhere"}"\nresume = "{root / "other"}"\ndry_run = false\n'
    (run / "config.toml").write_text(elsewhere + text)
    run_quickly(["--resume", run], monkeypatch)
    assert (run / "summary.json").exists() and not (root / "elsewhere").exists()


def test_a_config_whose_output_is_a_folder_of_somebody_is_refused(world):
    root, words = world
    (root / "theirs").mkdir()
    (root / "theirs" / "thesis.txt").write_text("precious")
    (root / "config.toml").write_text(f'output = "{root / "theirs"}"\n')
    with pytest.raises(UserError, match="is not empty and holds no run"):
        train.main([*map(str, words), "--config", str(root / "config.toml")])
    assert [path.name for path in (root / "theirs").iterdir()] == ["thesis.txt"]


def test_links_in_a_run_directory_lead_no_write_out_of_it(world, monkeypatch):
    """train.log is added to, so a link is refused; the other files are replaced whole, and with them the link."""
    root, words = world
    run, victim = stopped(words, root / "run", monkeypatch), root / "victim"
    victim.write_text("precious")
    names = ["metrics.jsonl", "adapter_model.safetensors", "adapter_config.json", "labels.json"]
    for name in [*names, "preprocess.json", "summary.json"]:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(victim)
    log = (run / "train.log").rename(root / "train.log")
    (run / "train.log").symlink_to(victim)
    with pytest.raises(RunError, match="train.log is a link, which is not followed; remove it"):
        train.main(["--resume", str(run)])
    assert victim.read_text() == "precious"
    log.rename(run / "train.log")
    (run / "labels.json").unlink(missing_ok=True)
    run_quickly(["--resume", run], monkeypatch)
    assert victim.read_text() == "precious"
    assert not [path.name for path in run.iterdir() if path.is_symlink()]


def test_starts_of_one_torchrun_share_a_numbered_directory(tmp_path, monkeypatch):
    """Without --output; a new launch, and one without restarts, get a directory of their own."""
    monkeypatch.chdir(tmp_path)
    config = Config(model="vit-nano-patch8-48", lr=1e-3, head="linear")

    def start(count, run_id="a", restarts="3", parent=7):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        monkeypatch.setattr(os, "getppid", lambda: parent)
        return rundir.open_run_dir(config, BASE).name

    assert start(0) == "classify-lora-000" == start(1) == start(2)
    assert start(0, parent=8) == "classify-lora-001" == start(1, parent=8)
    assert start(0, "b") == "classify-lora-002" and start(1) == "classify-lora-000"
    assert start(0, restarts="0") == "classify-lora-003"
    assert read_toml(tmp_path / "runs/classify-lora-000")["lr"] == 1e-3
