"""The table of backbones: which runs there are, what is said of wrong ones, and what is printed in the end."""

import shlex
import subprocess
import sys

import pytest

from minilora.commands import backbones
from minilora.errors import UserError
from reference_models import ModelError, create_model, save_pretrained
from tests.support.cli_data import ROOT, program, write_photos
from tests.test_readme import GUIDE

VIT, BEIT, SWIN = "vit-nano-patch8-48", "beit-nano-patch8-48", "swin-nano-patch4-window6-48"
TINY = ["--weights", "none", "--max-steps", "1", "--batch-size", "4", "--lora-r", "2", "--device", "cpu"]


@pytest.fixture
def photos(tmp_path):
    return str(write_photos(tmp_path / "photos", train=2, val=1))


def arguments(photos, tmp_path, *more: str) -> list[str]:
    return [*more, *TINY, "--data-dir", photos, "--output", str(tmp_path / "out")]


def in_this_process(monkeypatch) -> list[str]:
    """Runs train.py without a new process each; the names of the runs that it was started for."""
    started, main = [], program("train").main

    def train(path, config):
        started.append(path.name)
        file = path.parent / "run.toml"
        file.write_text(backbones.to_toml(config), encoding="utf-8")
        try:
            return main(["--config", str(file), "--output", str(path)]) or None
        except (UserError, ModelError) as error:
            return str(error)

    monkeypatch.setattr(backbones, "train", train)
    return started


def table(text: str) -> list[list[str]]:
    """The cells of the table that was printed, without its head."""
    return [line.split() for line in text[text.index("backbone ") :].splitlines()[2:]]


def test_every_model_mode_and_augmentation_is_a_row_with_its_counts(photos, tmp_path, monkeypatch, capsys):
    started = in_this_process(monkeypatch)
    words = arguments(photos, tmp_path, "--models", VIT, "--modes", "lora", "linear", "--augment", "none", "basic")
    assert backbones.main(words) == 0
    rows = table(capsys.readouterr().out)
    assert [row[:3] for row in rows] == [
        [VIT, mode, augment] for mode in ("lora", "linear") for augment in ("none", "basic")
    ]
    # 4 blocks x 2 layers x rank 2 x (128 + 128), and the head's 3 x 129
    assert len(started) == 4 and [row[6] for row in rows] == ["4,483", "4,483", "387", "387"]
    written = (tmp_path / "out" / "table.md").read_text()
    assert written.startswith("| backbone | mode | augment | accuracy % | peak memory MB | seconds | trainable |")
    assert len(written.splitlines()) == 6


def test_a_finished_run_is_not_made_again_and_another_configuration_is_refused(photos, tmp_path, monkeypatch, capsys):
    started = in_this_process(monkeypatch)
    words = arguments(photos, tmp_path, "--models", VIT, "--augment", "none")
    assert backbones.main(words) == 0 and len(started) == 1
    first = table(capsys.readouterr().out)
    assert backbones.main([*words, "--augment", "none", "basic"]) == 0
    assert started == [f"{VIT}-lora-none", f"{VIT}-lora-basic"]
    assert table(capsys.readouterr().out)[0] == first[0]
    assert backbones.main([*words, "--lr", "0.5"]) == 1
    assert "holds a run of another configuration (--lr 0.002 there, 0.5 here)" in capsys.readouterr().err


def test_a_failed_run_is_named_and_the_others_go_on(photos, tmp_path, monkeypatch, capsys):
    in_this_process(monkeypatch)
    words = arguments(photos, tmp_path, "--models", SWIN, VIT)
    saved = save_pretrained(create_model(SWIN), tmp_path / "swin")
    (saved / "model.safetensors").write_bytes(b"no weights")
    assert backbones.main([*words, "--weights", f"{SWIN}={saved}", f"{VIT}=none"]) == 1
    shown = capsys.readouterr()
    assert f"failed: {SWIN}-lora-none: {saved}/model.safetensors: not a readable safetensors file" in shown.err
    assert [row[0] for row in table(shown.out)] == [VIT]


def test_a_damaged_run_is_named_and_the_others_are_shown(photos, tmp_path, monkeypatch, capsys):
    in_this_process(monkeypatch)
    words = arguments(photos, tmp_path, "--models", VIT, "--modes", "linear", "--augment", "none", "basic")
    assert backbones.main(words) == 0
    (tmp_path / "out" / f"{VIT}-linear-none" / "summary.json").write_text('{"best": 3')
    capsys.readouterr()
    assert backbones.main(words) == 1
    shown = capsys.readouterr()
    assert f"failed: {VIT}-linear-none: " in shown.err and "summary.json: cannot be read" in shown.err
    assert [row[2] for row in table(shown.out)] == ["basic"]


def test_seeds_make_one_row_with_mean_and_spread(photos, tmp_path, monkeypatch, capsys):
    started = in_this_process(monkeypatch)
    assert backbones.main(arguments(photos, tmp_path, "--models", VIT, "--seeds", "0", "1", "--modes", "linear")) == 0
    assert started == [f"{VIT}-linear-none-0", f"{VIT}-linear-none-1"]
    rows = table(capsys.readouterr().out)
    assert len(rows) == 1 and "±" in rows[0]


def test_a_table_file_and_a_split_of_5_percent_are_taken(tmp_path, monkeypatch, capsys):
    in_this_process(monkeypatch)
    photos = write_photos(tmp_path / "photos", train=8, val=0)
    files = sorted((photos / "train").rglob("*.png"))
    lines = [f"{file.relative_to(photos)},{file.parent.name}" for file in files]
    (photos / "labels.csv").write_text("\n".join(["file,label", *lines]) + "\n")
    words = arguments(str(photos / "labels.csv"), tmp_path, "--models", BEIT, "--val-split", "0.05", "--modes", "full")
    assert backbones.main(words) == 0
    shown = capsys.readouterr().out
    assert table(shown)[0][:2] == [BEIT, "full"] and "100.00" in shown


def test_a_model_folder_may_have_any_name(photos, tmp_path):
    folder = save_pretrained(create_model(VIT), tmp_path / "vit+1")
    words = ["--models", str(folder), "--weights", str(folder), "--data-dir", photos, "--output", str(tmp_path / "out")]
    plan, _ = backbones.read_plan(words)
    assert {name: (run.model, run.weights) for name, run in plan.items()} == {
        "vit+1-lora-none": (str(folder), str(folder))
    }


def test_as_a_program_each_run_is_a_process_and_stdout_is_the_table_alone(photos, tmp_path):
    words = arguments(photos, tmp_path, "--models", VIT, "--modes", "linear")
    command = [sys.executable, "-m", "minilora.commands.backbones", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 3), done.stderr
    assert done.stdout.startswith("backbone ") and "result: accuracy" in done.stderr


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "--models is missing"),
        (["--models"], "--models needs a value"),
        (["--models", "vit-huge"], "unknown model 'vit-huge'"),
        (["--models", VIT, VIT], "two runs would be called vit-nano-patch8-48-lora-none"),
        (["--models", VIT, "--modes", "ful"], "--mode must be one of lora, full, linear; got 'ful'; did you mean full"),
        (["--models", VIT, "--augment", "all"], "--augment must be one of none, basic, rand"),
        (["--models", VIT, "--model", VIT], "--model is not for a table of backbones; use --models"),
        (["--models", VIT, "--dry-run"], "--dry-run is not for a table of backbones"),
        (["--models", VIT, "--recipe", "choice-clip"], "--task choice: a table of backbones is for --task classify"),
        (["--models", VIT, "--learning-rate", "1"], "unknown flag --learning-rate"),
        (["--models", "vit-tiny-patch16-224"], "--weights is missing, and vit-tiny-patch16-224 is not bundled"),
        (["--models", VIT, "--weights", "a", "b"], "--weights a b: which is whose?"),
        (["--models", VIT, "--weights", f"{BEIT}=none"], f"{BEIT} is not one of --models"),
        (["--models", VIT, "--weights", "gone.safetensors"], "gone.safetensors: no such file"),
        (["--models", VIT, "--data-dir", "gone"], "gone"),
    ],
)
def test_bad_input_is_one_line_before_any_run(words, told, tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "train", lambda *_: pytest.fail("a run was started"))
    with pytest.raises((UserError, ModelError)) as caught:
        backbones.main([*words, "--output", str(tmp_path / "out")])
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_table_that_is_told_to_stop_tells_its_run_and_goes_on_from_there(photos, tmp_path):
    words = [*arguments(photos, tmp_path, "--models", VIT, "--modes", "linear"), "--log-interval", "1"]
    words[words.index("--max-steps") + 1] = "200"
    command = [sys.executable, "-m", "minilora.commands.backbones", *words, "--epochs", "400"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "step 5/" in line:
            break
    process.terminate()
    _, told = process.communicate(timeout=120)
    assert process.returncode == 143 and "go on with: python train.py --resume" in told
    assert list((tmp_path / "out" / f"{VIT}-linear-none" / "checkpoints").glob("step-*"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "resumed from" in done.stderr and f"{VIT}  linear" in done.stdout


def test_the_readmes_commands_are_tables_of_8_and_16_runs(tmp_path, monkeypatch):
    """Read up to the first run; the big weights stay where they are."""
    write_photos(tmp_path / "photos", train=1, val=1)
    (tmp_path / "deit_tiny.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    lines = [line for line in GUIDE.splitlines() if line.startswith("python -m minilora.commands.backbones")]
    plans = [backbones.read_plan(shlex.split(line)[3:])[0] for line in lines]
    assert [len(plan) for plan in plans] == [8, 16]
    first = plans[0]["swin-large-patch4-window12-384-full-none"]
    assert (first.lora_r, first.val_split, first.weights) == (16, 0.05, f"hf:microsoft/{first.model}")
