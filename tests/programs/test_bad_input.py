"""Mistakes of people: each gives one line that says what, where and what to do; exit code 2, never a traceback."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.errors import UserError
from minilora.tasks import load_run
from reference_models import ModelError, create_model, save_pretrained
from tests.support.cli_data import NANO, QUICK, ROOT, program, write_photos

train, evaluate = program("train"), program("evaluate")
MISTAKES = (UserError, ModelError)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "lora"
    train.main([*QUICK, "--data-dir", str(photos), "--output", str(path), "--max-steps", "1"])
    return path


def refused(main, *words) -> str:
    """The one-line message with which `main` refuses these words."""
    with pytest.raises(MISTAKES) as error:
        main([str(word) for word in words])
    assert "\n" not in str(error.value) and len(str(error.value)) > 20
    return str(error.value)


def test_the_programs_exit_with_2_and_one_line(tmp_path):
    for words in (["train.py", "--task", "clasify"], ["evaluate.py", str(tmp_path / "nothing")]):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr


def test_a_missing_data_folder_is_named():
    assert "no such folder" in refused(train.main, *NANO, "--data-dir", "/nonexistent/photos")


def test_a_format_that_needs_a_folder_asks_for_data_dir():
    assert "--data-dir is missing" in refused(train.main, *NANO, "--data-format", "folder")


def test_a_class_folder_without_a_picture_is_named(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/train/class_9").mkdir()
    assert "class_9: class folder without a picture" in refused(train.main, *NANO, "--data-dir", tmp_path / "photos")


def test_one_class_alone_is_refused(tmp_path):
    write_photos(tmp_path, classes=1)
    assert "only one class" in refused(train.main, *NANO, "--data-dir", tmp_path)


def test_a_format_of_another_task_is_refused(photos):
    assert "not for --task classify" in refused(train.main, *NANO, "--data-format", "vqa2", "--data-dir", photos)


def test_shapes_refuse_a_data_dir(photos):
    assert "leave --data-dir out" in refused(train.main, *NANO, "--data-format", "shapes", "--data-dir", photos)


def test_a_broken_picture_is_named_or_skipped(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    picture = next((folder / "train").rglob("*.png"))
    picture.write_bytes(picture.read_bytes()[:60])
    words = [*QUICK, "--data-dir", folder, "--output", tmp_path / "run"]
    assert picture.name in refused(train.main, *words)
    assert train.main([str(word) for word in [*QUICK, "--data-dir", folder, "--bad-data", "skip", "--max-steps", "1",
                                              "--output", tmp_path / "skipped"]]) == 0  # fmt: skip


@pytest.mark.parametrize(
    "words, told",
    [
        ("--model bert-nano", "bert-nano tells no classes apart; it is for questions: --task vqa --model vision=NAME"),
        ("--model mobilenet-v2 --weights none", "no linear layer but its head.*--mode linear"),
        ("--task choice --model vit-nano-patch8-48", "is no CLIP; --task choice needs one"),
        ("--task choice --model bert-nano", "is no CLIP"),
        ("--task vqa --model vit-nano-patch8-48", "needs two towers, such as vision="),
        ("--image-size 50", "cuts pictures into patches of 8; take a multiple"),
    ],
)
def test_a_model_that_does_not_fit_the_task_is_refused_with_the_reason(words, told):
    assert re.search(told, refused(train.main, *words.split()))


def test_a_folder_that_is_no_adapter_is_refused_with_the_reason(photos, tmp_path):
    words = [*QUICK, "--data-dir", photos, "--adapter"]
    assert "it does not exist" in refused(train.main, *words, tmp_path / "nowhere")
    assert "adapter_config.json is missing" in refused(train.main, *words, tmp_path)
    save_pretrained(create_model("vit-nano-patch8-48", num_classes=3), tmp_path / "whole")
    assert "a whole model, which goes with --weights" in refused(train.main, *words, tmp_path / "whole")


def test_a_model_without_bundled_weights_asks_for_a_file():
    assert "safetensors file" in refused(train.main, "--model", "vit-tiny-patch16-224")


def test_unknown_models_and_targets_name_the_nearest():
    assert "take mobilenet-v2" in refused(train.main, "--model", "resnet50", "--weights", "none")
    assert "--list-models" in refused(train.main, "--model", "nonsense", "--weights", "none")
    assert "did you mean vit-tiny-patch16-224?" in refused(train.main, "--model", "vit_tiny_patch16_224")
    assert "did you mean vit-tiny-patch16-224 or vit-tiny-patch16-384?" in refused(train.main, "--model", "vit-tiny")
    assert "weights of the hub are hf:org/name" in refused(train.main, "--model", "google/vit-base")
    assert "q_proj (4)" in refused(train.main, *NANO, "--target-modules", "query")
    assert "in layers [7]" in refused(train.main, *NANO, "--layers", "7")


@pytest.fixture
def weights(tmp_path):
    """A checkpoint of the nano ViT."""
    torch.manual_seed(0)
    return save_pretrained(create_model("vit-nano-patch8-48", num_classes=5), tmp_path / "nano") / "model.safetensors"


def test_truncated_weights_are_named(weights):
    weights.write_bytes(weights.read_bytes()[:-1000])
    told = refused(train.main, "--model", "vit-nano-patch8-48", "--weights", weights)
    assert "not a readable safetensors file" in told and str(weights) in told


def test_weights_of_another_model_are_named(weights):
    lone = weights.parents[1] / "lone.safetensors"
    lone.write_bytes(weights.read_bytes())
    told = refused(train.main, "--model", "vit-tiny-patch16-224", "--weights", lone)
    assert str(lone) in told and "it looks like --model vit-nano-patch8-48" in told


def test_sizes_of_a_checkpoint_that_are_not_the_names_are_printed(weights, capsys):
    assert train.main(["--model", "vit-tiny-patch16-224", "--weights", str(weights), "--dry-run"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "own sizes" in line)
    assert "dim 128 (not 192)" in line and "patch_size 8 (not 16)" in line


def test_weights_with_nan_name_the_tensor(weights):
    tensors = load_file(weights)
    tensors["norm.weight"][3] = float("nan")
    save_file(tensors, weights)
    assert "norm.weight holds NaN" in refused(train.main, "--model", "vit-nano-patch8-48", "--weights", weights)


def test_weights_without_one_key_are_refused_by_its_name(weights):
    tensors = load_file(weights)
    save_file({key: tensor for key, tensor in tensors.items() if key != "norm.bias"}, weights)
    assert "norm.bias" in refused(train.main, "--model", "vit-nano-patch8-48", "--weights", weights)


def test_an_adapter_of_another_model_is_refused(run, photos):
    words = ["--model", "vit-tiny-patch16-224", "--weights", "none", "--data-dir", photos, "--adapter", run]
    assert "does not fit this model" in refused(train.main, *words)


def test_an_adapter_of_another_rank_than_asked_for_is_refused(run, photos):
    words = [*NANO, "--data-dir", photos, "--adapter", run, "--lora-r", "4"]
    assert "has r 8; leave the flag out" in refused(train.main, *words)


def test_an_adapter_of_a_run_brings_its_model_and_its_head(photos, tmp_path, capsys):
    """A head of a thousand classes is replaced by nobody's choice: the run's own comes after it."""
    model = tmp_path / "model"
    save_pretrained(create_model("vit-nano-patch8-48", num_classes=7), model)
    first = ["--model", model, "--data-dir", photos, "--max-steps", "1", "--output", tmp_path / "first"]
    assert train.main([str(word) for word in first]) == 0
    assert "a new one for 3 replaces it" in capsys.readouterr().out
    again = ["--adapter", tmp_path / "first", "--data-dir", photos, "--max-steps", "1", "--output", tmp_path / "again"]
    for _ in range(2):  # the second time the run is resumed, as the same one
        assert train.main([str(word) for word in again]) == 0
    out = capsys.readouterr().out
    assert f"started from the adapter {tmp_path / 'first'}\n" in out and "replaces it" not in out
    assert load_run(tmp_path / "again").config.model == str(model)
    told = refused(train.main, "--task", "vqa", "--adapter", tmp_path / "first")
    assert "is a run of --task classify; this one is --task vqa" in told


def test_questions_without_a_task_are_recognised(tmp_path):
    (tmp_path / "train_questions.json").write_text("{}")
    assert "questions lie here, which --task vqa reads" in refused(train.main, *NANO, "--data-dir", tmp_path)
    (tmp_path / "train_questions.json").rename(tmp_path / "dataset_v7w_telling.json")
    assert "questions lie here, which --task choice reads" in refused(train.main, *NANO, "--data-dir", tmp_path)


def test_an_adapter_with_other_classes_is_refused(run, tmp_path):
    write_photos(tmp_path, classes=4)
    assert "head.weight" in refused(train.main, *NANO, "--data-dir", tmp_path, "--adapter", run)


def test_a_folder_that_is_no_run_is_refused_with_a_hint(run, tmp_path):
    assert "no such run directory" in refused(evaluate.main, tmp_path / "none")
    assert "is a file; name its run directory" in refused(evaluate.main, run / "config.toml")
    assert f"did you mean {run}?" in refused(evaluate.main, run.parent)
    assert "is not a run directory" in refused(evaluate.main, tmp_path)
    assert "is not a run directory" in refused(train.main, "--resume", tmp_path)


def test_a_run_without_weights_or_labels_is_refused_by_the_files_name(run, tmp_path):
    for name in ("adapter_model.safetensors", "labels.json", "adapter_config.json"):
        copy = shutil.copytree(run, tmp_path / name)
        (copy / name).unlink()
        assert name in refused(evaluate.main, copy)


def test_damaged_labels_are_named(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "labels.json").write_text('{"labels": ["a"')
    assert "labels.json" in refused(evaluate.main, copy)


def test_base_weights_that_are_gone_or_have_changed_are_noticed(weights, photos, tmp_path):
    words = ["--model", "vit-nano-patch8-48", "--weights", weights, "--data-dir", photos, "--max-steps", "1"]
    train.main([str(word) for word in [*words, "--output", tmp_path / "run"]])
    moved = shutil.move(weights, tmp_path / "moved.safetensors")
    told = refused(evaluate.main, tmp_path / "run")
    assert "are gone; say where they are now with --weights" in told and str(weights) in told
    assert evaluate.main([str(tmp_path / "run"), "--weights", str(moved)]) == 0
    tensors = load_file(moved)
    tensors["norm.weight"] += 1
    save_file(tensors, moved)
    assert "sha256 differs" in refused(evaluate.main, tmp_path / "run", "--weights", moved)


def test_a_random_base_of_another_seed_is_noticed(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("seed = 0", "seed = 1"))
    with pytest.raises(UserError, match="random weights come out differently"):
        load_run(copy)


def test_classes_that_the_run_does_not_know_are_refused(run, tmp_path):
    folder = write_photos(tmp_path / "photos")
    (folder / "val/class_0").rename(folder / "val/wolf")
    (folder / "train/class_0").rename(folder / "train/wolf")
    assert "'wolf' is not a class of this run" in refused(evaluate.main, run, "--data-dir", folder)


def test_flags_that_evaluate_cannot_use_are_refused(run, photos):
    assert "name a run directory, or a base model" in refused(evaluate.main)
    assert "the run knows its own" in refused(evaluate.main, run, "--model", "vit-nano-patch8-48")
    assert "have no such part" in refused(evaluate.main, run, "--split", "test")
    assert "did you mean --predictions?" in refused(evaluate.main, run, "--prediction", "x.csv")
    assert "is not for a run of --task classify; leave it out" in refused(
        evaluate.main, run, "--image", "x.png", "--question", "why?"
    )


@pytest.mark.parametrize(
    "words, told",
    [
        ("--question why?", "--question needs --image"),
        ("--choices a b", "--choices needs --image"),
        ("--layout timm", "--layout needs --merge-to or --export-adapter"),
        ("--per-head", "--per-head needs --attention"),
        ("--prune-epochs 1", "--prune-epochs needs --prune"),
        ("--image x.png --report r.html", "--report has no effect beside --image"),
        ("--device mps", "--device must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_flags_of_evaluate_that_would_do_nothing_are_refused(run, words, told):
    assert told in refused(evaluate.main, run, *words.split())


def test_flags_for_one_run_are_refused_for_two_and_for_none(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    for flag in ("--image", "--predictions", "--merge-to"):
        assert f"{flag} takes one run, but 2 are named" in refused(evaluate.main, run, other, flag, "x")
    assert "is named twice" in refused(evaluate.main, run, run)
    words = ["--model", "clip-nano", "--data-format", "shapes", "--report", "x.html"]
    assert "--report needs a run directory" in refused(evaluate.main, *words)


def test_files_that_are_no_pictures_are_named(run, photos, tmp_path):
    (tmp_path / "text.png").write_text("no picture at all")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, told in (("text.png", "not a picture"), ("empty.png", "is empty"), ("no.png", "no such file")):
        assert told in refused(evaluate.main, run, "--image", tmp_path / name)
    assert "is not a file" in refused(evaluate.main, run, "--image", photos)


def test_what_cannot_be_written_is_told_before_the_work(run, tmp_path):
    for flag in ("--predictions", "--submission", "--report"):
        assert "there is no folder" in refused(evaluate.main, run, flag, tmp_path / "none" / "x.csv")
        assert "is a folder; name a file" in refused(evaluate.main, run, flag, tmp_path)


@pytest.mark.parametrize("flag", ["--merge-to", "--export-adapter"])
def test_an_export_replaces_no_run_and_nobodys_files(flag, run, photos, tmp_path):
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert "is a run, whose own files would be replaced" in refused(evaluate.main, run, flag, run)
    assert "holds other files than a model's" in refused(evaluate.main, run, flag, photos)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    (tmp_path / "notes.txt").write_text("precious")
    assert "is a file; name a folder" in refused(evaluate.main, run, flag, tmp_path / "notes.txt")
    for _ in range(2):  # an export may replace an export
        assert evaluate.main([str(run), flag, str(tmp_path / "out")]) == 0


def test_a_run_whose_config_names_another_task_is_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace('task = "classify"', 'task = "vqa"'))
    assert "two towers" in refused(evaluate.main, copy)


def test_a_base_model_that_lacks_the_folders_classes_is_refused(weights, photos):
    words = ["--model", "vit-nano-patch8-48", "--weights", weights, "--data-dir", photos]
    told = refused(evaluate.main, *words)
    assert "class 'class_0' is none of the 5 classes" in told and "train a head" in told
    words = ["--model", "vit-tiny-patch16-224", "--weights", "none", "--data-dir", photos]
    assert json.dumps("imagenet_index") in refused(evaluate.main, *words)
