"""train.py, then evaluate.py: what a run leaves behind, that it is the same twice, resumes, moves and exports."""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minilora.errors import UserError
from minilora.settings.parse import read_toml
from minilora.tasks import load_run
from tests.support.cli_data import NANO, QUICK, ROOT, program, write_photos

train, evaluate = program("train"), program("evaluate")
FILES = {"config.toml", "adapter_config.json", "adapter_model.safetensors", "labels.json", "preprocess.json"}
FILES |= {
    "metrics.jsonl",
    "summary.json",
    "train.log",
    "curves.png",
    "attention.png",
    "report.html",
    "README.md",
    "checkpoints",
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), test=1)


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """One finished LoRA run."""
    path = tmp_path_factory.mktemp("runs") / "lora"
    assert train.main([*QUICK, "--data-dir", str(photos), "--output", str(path)]) == 0
    return path


def summary(path):
    return json.loads((path / "summary.json").read_text())


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_run_directory_has_every_file_and_nothing_else(run):
    assert {path.name for path in run.iterdir()} == FILES


def test_summary_says_what_was_done(run):
    found = summary(run)
    assert found["parameters"] == {"trainable": 16384 + 387, "total": 829104 - 48 * 129 + 387 + 16384}
    assert found["seed"] == 0 and found["test"]["accuracy"] >= 0 and len(found["weights_sha256"]) == 64
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = {"epoch", "step", "lr", "train_loss", "val_loss", "accuracy", "seconds", "images_per_second"}
    assert len(lines) == 2 and keys | {"peak_memory_mb"} <= set(lines[0])


def test_equal_runs_have_equal_weights_and_another_seed_has_others(run, photos, tmp_path):
    again = [*QUICK, "--data-dir", str(photos), "--output"]
    train.main([*again, str(tmp_path / "same")])
    train.main([*again, str(tmp_path / "other"), "--seed", "1"])
    assert summary(tmp_path / "same")["weights_sha256"] == summary(run)["weights_sha256"]
    assert summary(tmp_path / "other")["weights_sha256"] != summary(run)["weights_sha256"]


def test_workers_change_no_bit(run, photos, tmp_path):
    train.main([*QUICK, "--data-dir", str(photos), "--output", str(tmp_path / "w"), "--workers", "2"])
    assert summary(tmp_path / "w")["weights_sha256"] == summary(run)["weights_sha256"]


def test_config_toml_of_a_run_trains_it_again(run, tmp_path):
    train.main(["--config", str(run), "--output", str(tmp_path / "again")])
    assert summary(tmp_path / "again")["weights_sha256"] == summary(run)["weights_sha256"]


def test_the_same_command_goes_on_with_a_finished_run(run, photos, capsys):
    before = (run / "adapter_model.safetensors").read_bytes()
    train.main([*QUICK, "--data-dir", str(photos), "--output", str(run)])
    assert "resumed" in capsys.readouterr().out
    assert (run / "adapter_model.safetensors").read_bytes() == before


def test_another_configuration_is_refused_and_named(run, photos):
    with pytest.raises(UserError, match=r"--epochs 2 there, 3 here"):
        train.main([*QUICK, "--data-dir", str(photos), "--output", str(run), "--epochs", "3"])
    with pytest.raises(UserError, match=r"--lr 0.001 there, 0.5 here"):
        train.main(["--resume", str(run), "--lr", "0.5"])


def test_a_folder_with_other_files_is_refused(photos, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty and holds no run"):
        train.main([*QUICK, "--data-dir", str(photos), "--output", str(tmp_path)])


def test_runs_without_output_are_numbered(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main([*QUICK, "--data-dir", str(photos), "--mode", "linear", "--max-steps", "1"])
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["classify-linear-000", "classify-linear-001"]


def test_a_moved_run_predicts_the_same(run, photos, tmp_path):
    pictures = sorted((photos / "val").rglob("*.png"))
    before = load_run(run).predict(pictures)
    moved = shutil.copytree(run, tmp_path / "elsewhere")
    assert load_run(moved).predict([Image.open(path) for path in pictures]) == before
    assert all(abs(sum(p for _, p in row) - 1) < 1e-5 for row in before)


@pytest.mark.parametrize("mode", ["full", "linear"])
def test_the_other_modes_run_and_load(mode, photos, tmp_path):
    path = tmp_path / mode
    train.main([*QUICK, "--data-dir", str(photos), "--output", str(path), "--mode", mode, "--lr", "1e-3"])
    run = load_run(path)
    assert run.labels == ["class_0", "class_1", "class_2"]
    evaluate.main([str(path)])
    counts = summary(path)["parameters"]
    assert counts["trainable"] == (counts["total"] if mode == "full" else 3 * 129)


def test_a_full_run_is_a_checkpoint_by_itself(photos, tmp_path):
    train.main([*QUICK, "--data-dir", str(photos), "--output", str(tmp_path / "full"), "--mode", "full"])
    words = ["--model", str(tmp_path / "full"), "--data-dir", str(photos), "--output", str(tmp_path / "next")]
    train.main([*words, "--max-steps", "1", "--batch-size", "4"])
    assert load_run(tmp_path / "next").labels == ["class_0", "class_1", "class_2"]


def test_score_of_a_run_is_the_score_of_its_best_epoch(run):
    evaluation_scores = load_run(run).evaluate(evaluate.EvalConfig()).scores
    best = summary(run)["best"]
    assert evaluation_scores["accuracy"] == best["accuracy"]
    assert evaluation_scores["loss"] == pytest.approx(best["val_loss"], abs=1e-5)


def test_cached_features_train_the_same_head(photos, tmp_path):
    words = [*QUICK, "--data-dir", str(photos), "--mode", "linear", "--output"]
    train.main([*words, str(tmp_path / "plain")])
    train.main([*words, str(tmp_path / "cached"), "--cache-features"])
    plain, cached = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "cached"))
    for name, tensor in plain.items():
        torch.testing.assert_close(cached[name], tensor, atol=1e-5, rtol=1e-4)


def test_adapter_continues_from_an_earlier_run(run, photos, tmp_path):
    words = [*NANO, "--data-dir", str(photos), "--adapter", str(run), "--batch-size", "4"]
    train.main([*words, "--lr", "1e-30", "--max-steps", "1", "--output", str(tmp_path / "next")])
    before, after = (load_file(path / "adapter_model.safetensors") for path in (run, tmp_path / "next"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-6)


def test_half_precision_base_trains_float32(photos, tmp_path):
    words = [*QUICK, "--data-dir", str(photos), "--base-dtype", "bf16", "--output", str(tmp_path / "half")]
    train.main(words)
    tensors = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_predictions_have_one_row_per_picture_in_order(run, photos, tmp_path):
    evaluate.main([str(run), "--predictions", str(tmp_path / "p.csv"), "--submission", str(tmp_path / "s.csv")])
    header, *rows = rows_of(tmp_path / "p.csv")
    assert header[:3] == ["file", "label", "probability"] and len(header) == 7
    assert [row[0] for row in rows] == [str(p.relative_to(photos)) for p in sorted((photos / "val").rglob("*.png"))]
    assert [row[:2] for row in rows] == rows_of(tmp_path / "s.csv")[1:]


def test_an_unlabelled_folder_with_a_broken_picture_keeps_its_rows(run, photos, tmp_path):
    folder = tmp_path / "loose"
    folder.mkdir()
    for i, picture in enumerate(sorted((photos / "val").rglob("*.png"))[:3]):
        shutil.copy(picture, folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"not a picture")
    evaluate.main([str(run), "--data-dir", str(folder), "--predictions", str(tmp_path / "p.csv")])
    _, *rows = rows_of(tmp_path / "p.csv")
    assert [row[0] for row in rows] == ["0.png", "1.png", "2.png"]
    assert [bool(row[1]) for row in rows] == [True, False, True] and set(rows[1][1:]) == {""}


def test_several_runs_are_compared_over_their_seeds(run, photos, tmp_path, capsys):
    train.main([*QUICK, "--data-dir", str(photos), "--output", str(tmp_path / "seed1"), "--seed", "1"])
    capsys.readouterr()
    page = tmp_path / "both.html"
    evaluate.main([str(run), str(tmp_path / "seed1"), "--report", str(page)])
    assert "2 seeds" in capsys.readouterr().out and "±" in page.read_text()


def test_image_attention_spectrum_and_latency_print_what_they_name(run, photos, capsys):
    picture = str(next((photos / "val").rglob("*.png")))
    evaluate.main([str(run), "--image", picture])
    assert capsys.readouterr().out.startswith(f"{picture}: class_")
    evaluate.main([str(run), "--attention", "2", "--spectrum", "--latency"])
    out = capsys.readouterr().out
    assert "blocks.0.attn.q_proj" in out and "batch 1 " in out and (run / "evaluation/spectrum.png").exists()
    shutil.rmtree(run / "evaluation")


def test_merged_and_exported_weights_give_the_same_answers(run, photos, tmp_path):
    transformers = pytest.importorskip("transformers")
    evaluate.main([str(run), "--merge-to", str(tmp_path / "merged"), "--layout", "transformers"])
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert model.config.id2label == {0: "class_0", 1: "class_1", 2: "class_2"}
    ours = load_run(run)
    batch = ours.batch(3, evaluate.EvalConfig())
    with torch.no_grad():
        torch.testing.assert_close(model(batch["image"]).logits, ours.logits(batch), atol=1e-5, rtol=1e-4)


def test_dry_run_says_everything_and_trains_nothing(photos, tmp_path, capsys):
    words = [*QUICK, "--data-dir", str(photos), "--output", str(tmp_path / "none"), "--dry-run"]
    assert train.main(words) == 0
    out = capsys.readouterr().out
    assert "12 train, 6 val, 3 test" in out and "4 x q_proj (128 -> 128, r 8, scale 2)" in out
    assert "steps: 3 per epoch, 6 in all" in out and "memory: about" in out
    assert not (tmp_path / "none").exists()


def test_estimated_activations_are_those_that_are_kept(photos):
    """The estimate counts two items; a whole batch keeps that many times more, within a tenth."""
    from minilora.commands.dryrun import memory_estimate, saved_bytes
    from minilora.settings.parse import parse_args
    from minilora.tasks import build_task

    config, _ = parse_args([*QUICK, "--data-dir", str(photos), "--batch-size", "12"])
    task = build_task(config)
    options = train.train_options(config, "fp32", None)
    estimate = memory_estimate(task, options, torch.device("cpu"))["activations"]
    batch = next(iter(task.train_loader(0, task.train_batches(0)[:1])))
    assert estimate == pytest.approx(saved_bytes(task, batch, "fp32", torch.device("cpu"))[0], rel=0.1)


def allocated_at_most(run) -> int:
    """The most bytes that were alive at once of those that `run()` allocated, from torch's own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    sizes = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize(("mode", "rel"), [("lora", 0.15), ("full", 0.15), ("linear", 0.3)])
def test_the_estimated_memory_is_what_two_steps_allocate_at_most(photos, mode, rel):
    from minilora.commands.dryrun import memory_estimate
    from minilora.settings.parse import parse_args
    from minilora.tasks import build_task

    config, _ = parse_args([*QUICK, "--data-dir", str(photos), "--batch-size", "12", "--mode", mode])
    task = build_task(config)
    estimate = memory_estimate(task, train.train_options(config, "fp32", None), torch.device("cpu"))
    batch = next(iter(task.train_loader(0, task.train_batches(0)[:1])))
    optimizer = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad])

    def two_steps():
        for _ in range(2):
            optimizer.zero_grad()
            task.loss(task.model, batch)[0].backward()
            optimizer.step()

    allocated = sum(estimate.values()) - estimate["weights"]  # the weights are there before
    assert allocated == pytest.approx(allocated_at_most(two_steps), rel=rel)


def test_without_the_plots_extra_everything_else_works(photos, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.pyplot", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "plain"
    assert train.main([*QUICK, "--data-dir", str(photos), "--output", str(path), "--max-steps", "1"]) == 0
    assert capsys.readouterr().out.count("matplotlib") == 1
    assert {p.name for p in path.iterdir()} == FILES - {"curves.png"}


def test_the_lists_are_printed_in_100_columns_and_nothing_is_trained(capsys):
    assert train.main(["--list-models"]) == train.main(["--list-recipes"]) == 0
    assert train.main(["--list-targets", "vit-tiny-patch16-224"]) == 0
    out = capsys.readouterr().out
    assert "vit-base-patch16-224" in out and "imagewoof-vit-tiny" in out and "q_proj" in out
    assert max(map(len, out.splitlines())) <= 100
    assert any(line.split() == ["clip-nano", "choice,", "zero-shot", "bundled"] for line in out.splitlines())


def test_an_interrupted_run_resumes_to_the_same_weights(run, photos, tmp_path):
    """SIGTERM in the middle: exit code 143, the command to go on with, and then the bits of the undisturbed run."""
    path = tmp_path / "stopped"
    words = [*QUICK, "--data-dir", str(photos), "--output", str(path), "--log-interval", "1"]
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONUNBUFFERED": "1"})  # fmt: skip
    for line in process.stdout:
        if " step 1/" in line:
            process.terminate()
            break
    out = process.stdout.read()
    if process.wait(60) == 0:
        pytest.skip("the run was over before the signal came")
    assert process.returncode == 143 and f"--resume {path}" in out
    time.sleep(0.1)
    train.main(["--resume", str(path)])
    assert summary(path)["weights_sha256"] == summary(run)["weights_sha256"]


def test_resolved_configuration_names_model_weights_and_lr(run):
    values = read_toml(run)
    assert (values["model"], values["weights"], values["lr"]) == ("vit-nano-patch8-48", "none", 1e-3)


def test_deit_scores_as_timm_with_its_own_head(shared, capsys):
    """70.0 % over 1000 classes and 93.75 % among the ten breeds, as timm on the same file and pictures."""
    weights = shared / "weights" / "deit_tiny_patch16_224.fp16.safetensors"
    words = ["--model", "vit-tiny-patch16-224", "--weights", str(weights), "--data-dir", str(shared / "imagewoof224")]
    threads = torch.get_num_threads()
    try:
        assert evaluate.main([*words, "--threads", "2"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "70.00 % ± 2.29 over all 1000 classes, 93.75 % ± 1.21 among the folder's 10" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one_with_the_doubled_batch(photos, tmp_path):
    words = [*NANO, "--epochs", "2", "--data-dir", str(photos), "--device", "cpu", "--amp", "fp32"]
    train.main([*words, "--batch-size", "4", "--output", str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", *words]
    subprocess.run([*command, "--batch-size", "2", "--output", str(tmp_path / "two")], cwd=ROOT, check=True)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=5e-6, rtol=1e-5)
    assert (summary(tmp_path / "one")["best"]["accuracy"]) == summary(tmp_path / "two")["best"]["accuracy"]


def test_a_run_that_its_time_limit_ends_is_whole_and_names_the_command_that_resumes_it(photos, tmp_path, capsys):
    run, words = str(tmp_path / "run"), ["--data-dir", str(photos), *QUICK]
    assert train.main([*words, "--output", run, "--time-limit", "1e-9"]) == 0
    said = capsys.readouterr().out
    assert "time limit of 1e-09 minutes reached after step 1" in said and f"python train.py --resume {run}" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
    assert (tmp_path / "run" / "report.html").is_file()
    assert train.main(["--resume", run, "--time-limit", "60"]) == 0
    assert "time limit" not in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2 * 3
