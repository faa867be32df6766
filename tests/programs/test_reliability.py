"""Runs of train.py and evaluate.py in trouble: no space, damaged files, NaN, broken pictures. Nothing is lost."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minilora.errors import RunError, UserError
from minilora.tasks import load_run
from minilora.training import checkpoint
from tests.data.test_images import png_header
from tests.support.cli_data import ROOT
from tests.support.tiny_tasks import bits, evaluate, run_quickly, train, write_tasks

TASKS = ("classify", "vqa", "choice")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def run(tasks, tmp_path_factory):
    """A finished run of two steps, with everything that train.py leaves."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert train.main([*tasks["classify"], "--max-steps", "2", "--save-every", "1", "--output", str(path)]) == 0
    return path


def mounts_allowed() -> bool:
    words = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


@pytest.mark.parametrize("rooms", [(4, 48), pytest.param(range(0, 72, 3), marks=pytest.mark.slow)])
def test_a_full_disk_costs_nothing_and_the_run_goes_on_when_there_is_room(tmp_path, rooms):
    """Exit 1 and one line; the old checkpoint as it was, no torso; later the bits of a run that had room."""
    if not mounts_allowed():
        pytest.skip("a tmpfs cannot be mounted here (needs root); RLIMIT_FSIZE is tested in test_faults.py")
    words = ["unshare", "-m", sys.executable, "-m", "tests.support.disk_lab", tmp_path, *rooms]
    done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["complaints"] == []
    assert set(found["codes"]) == {1} and len(found["codes"]) == len(rooms)
    for message in found["messages"]:
        assert message.startswith("error: ") and "no space left" in message and message.count("\n") == 1


# ---- damaged files ------------------------------------------------------------------------------------------


def flipped(path: Path, place: int, bit: int) -> bytes:
    """The old content of a file in which one bit was changed."""
    old = path.read_bytes()
    new = bytearray(old)
    new[place] ^= 1 << bit
    path.write_bytes(new)
    return old


@pytest.mark.parametrize("cases", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_a_real_checkpoint_is_noticed(run, cases):
    newest, rng = checkpoint.latest_checkpoint(run), random.Random(0)
    files = sorted(newest.iterdir())
    for _ in range(cases):
        path = rng.choice(files)
        old = flipped(path, rng.randrange(path.stat().st_size), rng.randrange(8))
        assert checkpoint.why_invalid(newest), path
        path.write_bytes(old)
    assert checkpoint.why_invalid(newest) is None


@pytest.mark.parametrize("cases", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_the_weights_of_a_finished_run_is_noticed(run, tmp_path, cases):
    """safetensors accepts one; summary.json knows the file's sha256."""
    copy, rng = shutil.copytree(run, tmp_path / "run"), random.Random(1)
    path = copy / "adapter_model.safetensors"
    for _ in range(cases):
        old = flipped(path, rng.randrange(path.stat().st_size), rng.randrange(8))
        with pytest.raises(UserError, match="sha256 differs"):
            load_run(copy)
        path.write_bytes(old)
    load_run(copy)


def test_an_adapter_of_another_run_in_its_place_is_noticed(run, tasks, tmp_path, monkeypatch):
    run_quickly([*tasks["classify"], "--max-steps", "1", "--seed", "1", "--output", tmp_path / "other"], monkeypatch)
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", copy)
    with pytest.raises(UserError, match="damaged or exchanged"):
        load_run(copy)


def test_a_broken_newest_checkpoint_is_passed_over_with_a_line(run, tasks, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    flipped(checkpoint.latest_checkpoint(copy) / "state.safetensors", 100, 3)
    run_quickly([*tasks["classify"], "--max-steps", "2", "--save-every", "1", "--output", copy], monkeypatch)
    said = capsys.readouterr().out
    assert "step-2 is skipped: its files do not agree" in said and "resumed from" in said
    assert bits(copy)["weights"] == bits(run)["weights"]


def test_nan_in_an_adapter_is_refused_wherever_it_is_read(run, tasks, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    tensors = load_file(copy / "adapter_model.safetensors")
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, copy / "adapter_model.safetensors")
    (copy / "summary.json").unlink()
    for program, words in (
        (evaluate, [str(copy)]),
        (train, [*tasks["classify"], "--adapter", str(copy), "--output", str(tmp_path / "next")]),
    ):
        with pytest.raises(UserError, match="holds NaN"):
            program.main(words)
    assert not (tmp_path / "next").exists()


# ---- NaN and infinity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_rate_that_blows_up_ends_with_a_message_and_leaves_no_nan(tasks, task, tmp_path, monkeypatch):
    words = [*tasks[task], "--lr", "1e30", "--save-every", "1", "--epochs", "3", "--output", tmp_path / "run"]
    with pytest.raises(RunError) as caught:
        run_quickly(words, monkeypatch)
    told = str(caught.value)
    assert "\n" not in told and "--lr" in told
    assert ("step " in told and "checkpoint" in told and "is not finite; batch: " in told) or "holds NaN" in told
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values() if tensor.is_floating_point())
    newest = checkpoint.latest_checkpoint(tmp_path / "run")
    assert newest is None or checkpoint.why_invalid(newest) is None


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("task", TASKS)
def test_a_poisoned_batch_names_step_and_files_and_skip_goes_on(tasks, task, policy, tmp_path, monkeypatch):
    """The third batch of the run gives NaN, as a broken kernel or a damaged picture may."""
    seen, build = [], train.build_task

    def poisoned(config, device):
        built = build(config, device)
        loss = built.loss

        def broken(model, batch):
            mean, stats = loss(model, batch)
            seen.append(built.describe(batch))
            return (mean * float("nan") if len(seen) == 3 else mean), stats

        built.loss = broken
        return built

    monkeypatch.setattr(train, "build_task", poisoned)
    words = [*tasks[task], "--nan-policy", policy, "--save-every", "1", "--epochs", "1", "--output", tmp_path / "run"]
    if policy == "skip":
        run_quickly(words, monkeypatch)
        log = (tmp_path / "run/train.log").read_text()
        assert "skipped step 3: the loss " in log and seen[2] in log
        rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["skipped_steps"] == 1 and rows[-1]["train_loss"] is not None
    else:
        with pytest.raises(RunError, match=r"epoch 1, step 3 \(last checkpoint .*step-2\): the loss") as caught:
            run_quickly(words, monkeypatch)
        assert seen[2] in str(caught.value) and ".png" in seen[2]
        assert checkpoint.latest_checkpoint(tmp_path / "run").name == "step-2"
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values() if tensor.is_floating_point())


# ---- pictures -----------------------------------------------------------------------------------------------


def write_odd_pictures(folder: Path) -> dict[str, bool]:
    """Pictures of every troublesome kind; {name: whether it can be read}, in the order of the names."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    rgb.save(folder / "a_fine.jpg")
    (folder / "b_truncated.jpg").write_bytes((folder / "a_fine.jpg").read_bytes()[:700])
    (folder / "c_empty.png").write_bytes(b"")
    rgb.save(folder / "d_png.tmp", "PNG")
    (folder / "d_png.tmp").rename(folder / "d_png_called.jpg")
    rgb.save(folder / "e_animated.gif", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    Image.fromarray(pixels[..., 0].astype(np.uint16) << 8).save(folder / "f_16bit.png")
    rgb.convert("CMYK").save(folder / "g_cmyk.jpg")
    palette = rgb.convert("P")
    palette.save(folder / "h_palette_alpha.png", transparency=3)
    Image.new("RGB", (1, 1), (9, 9, 9)).save(folder / "i_1x1.png")
    Image.new("RGB", (20_000, 1)).save(folder / "j_20000x1.png")
    (folder / "k_bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "l_text.jpg").write_text("<html>404 not found</html>")
    rgb.convert("RGBA").save(folder / "m_alpha.webp")
    (folder / "n_folder.png").mkdir()
    rgb.save(folder / "o_last.bmp")
    bad = {"b_truncated.jpg", "c_empty.png", "k_bomb.png", "l_text.jpg"}
    return {path.name: path.name not in bad for path in sorted(folder.iterdir()) if path.is_file()}


def rows_of(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def test_predictions_have_one_row_for_every_picture_in_order_whatever_it_is(run, tmp_path, capsys):
    """And the rows of good pictures are those that they get alone, whatever stands before them."""
    expected = write_odd_pictures(tmp_path / "odd")
    table = tmp_path / "p.csv"
    words = [str(run), "--data-dir", str(tmp_path / "odd"), "--device", "cpu", "--batch-size", "4"]
    evaluate.main([*words, "--predictions", str(table)])
    rows = rows_of(table)
    assert [row[0] for row in rows] == list(expected)
    assert {row[0]: bool(row[1]) for row in rows} == expected
    assert all(set(row[1:]) == {""} for row in rows if not expected[row[0]])
    assert "4 of 14 pictures could not be read" in capsys.readouterr().out
    opened = load_run(run)
    for row in rows:
        if expected[row[0]]:
            (answer,) = opened.predict([tmp_path / "odd" / row[0]])
            assert (row[1], float(row[2])) == (answer[0][0], pytest.approx(answer[0][1], abs=1e-5))


def test_predictions_of_a_table_keep_the_order_of_its_rows(run, tmp_path):
    expected = write_odd_pictures(tmp_path / "odd")
    names = list(expected)
    random.Random(0).shuffle(names)
    names.insert(3, "missing.png")
    (tmp_path / "odd" / "list.csv").write_text("file\n" + "\n".join(names) + "\n")
    words = [str(run), "--data-dir", str(tmp_path / "odd" / "list.csv"), "--predictions", str(tmp_path / "p.csv")]
    evaluate.main([*words, "--workers", "2", "--batch-size", "3"])
    rows = rows_of(tmp_path / "p.csv")
    assert [row[0] for row in rows] == names
    assert [bool(row[1]) for row in rows] == [expected.get(name, False) for name in names]


def test_with_bad_data_error_the_first_broken_picture_is_named(run, tmp_path):
    write_odd_pictures(tmp_path / "odd")
    words = [str(run), "--data-dir", str(tmp_path / "odd"), "--bad-data", "error", "--predictions", "p.csv"]
    with pytest.raises(UserError, match="b_truncated.jpg: cannot be decoded"):
        evaluate.main(words)
    assert not Path("p.csv").exists()


# ---- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_equal_runs_have_equal_weights_and_another_seed_has_others(tasks, task, tmp_path, monkeypatch):
    words = [*tasks[task], "--max-steps", "2", "--augment", "rand", "--lora-dropout", "0.3"]
    digests = []
    for number, more in enumerate(([], ["--workers", "1"], ["--seed", "1"])):
        torch.manual_seed(number)  # what came before is of no consequence
        run_quickly([*words, *more, "--output", tmp_path / str(number)], monkeypatch)
        digests.append(bits(tmp_path / str(number))["summary"])
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.slow
def test_a_folder_of_100000_pictures_starts_in_seconds(tasks, tmp_path, monkeypatch):
    """From train.py's first line to the end of one optimizer step; the files of a class are links to one picture."""
    for part, each in (("train", 10_000), ("val", 1)):
        for label in range(10):
            folder = tmp_path / "photos" / part / f"class_{label}"
            folder.mkdir(parents=True)
            Image.new("RGB", (16, 16), (9, 99, 20 * label)).save(folder / "one.png")
            for i in range(each - 1):
                os.link(folder / "one.png", folder / f"{i:05d}.png")
    started = time.perf_counter()
    words = [*tasks["classify"], "--data-dir", tmp_path / "photos", "--max-steps", "1", "--output", tmp_path / "run"]
    run_quickly(words, monkeypatch)
    assert time.perf_counter() - started < 60, "seconds on a quiet machine; a crowded one is slower"
