"""Unequal classes and several labels, from the loss to the files of a run: --class-weights, --metric, --multi-label,
--seeds, --keep-checkpoints."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn import functional as F

from minilora.commands import shards
from minilora.errors import UserError
from minilora.settings.parse import parse_args
from minilora.tasks import load_run
from minilora.tasks.classify.task import ClassifyPredictor, MultiLabelPredictor, build
from minilora.tasks.labelled import Labelled, class_weights
from minilora.training import state
from minilora.training.checkpoint import checkpoint_dirs
from reference_models import create_model, load_pretrained, save_pretrained
from tests.support.cli_data import write_photos
from tests.support.label_data import write_scenes
from tests.support.tiny_tasks import VISION, bits, evaluate, run_quickly, train
from tests.tasks.test_resume import resumed_equals_whole


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model = create_model("vit-tiny-patch16-224", 3, **VISION | {"patch_size": 8})
    return save_pretrained(model, tmp_path_factory.mktemp("vit"))


def words(tiny, data, run, *more):
    quick = ["--batch-size", "5", "--device", "cpu", "--epochs", "2", "--log-interval", "1000"]
    return [*map(str, ["--model", tiny, "--data-dir", data, "--output", run]), *quick, *map(str, more)]


def task_of(predictor, smoothing=0.0):
    """What `Labelled.loss` asks of its task, around a model that gives its input back."""
    return SimpleNamespace(predictor=predictor, config=SimpleNamespace(smoothing=smoothing), teacher=None)


def loss_of(predictor, logits, batch, smoothing=0.0):
    leaf = logits.clone().requires_grad_()
    loss, stats = Labelled.loss(task_of(predictor, smoothing), nn.Identity(), batch | {"image": leaf})
    return loss, torch.autograd.grad(loss, leaf)[0], stats


def batch_of(labels, broken=()):
    valid = torch.ones(len(labels), dtype=torch.bool)
    valid[list(broken)] = False
    return {"label": torch.as_tensor(labels), "valid": valid}


# ---- unequal classes


def test_class_weights_are_sklearns_balanced_ones_scaled_to_mean_one():
    labels = [0] * 7 + [1] * 2 + [2] * 31 + [3]
    theirs = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    found = class_weights(labels, 4)
    assert np.allclose(found, theirs / theirs.mean(), atol=1e-6) and found.mean() == pytest.approx(1)
    absent = class_weights(labels, 6)
    assert torch.equal(absent, torch.cat((found, torch.zeros(2))))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_weighted_loss_and_its_gradient_are_the_dense_sum_over_the_rows(smoothing):
    logits, labels = 2 * torch.randn(7, 4), [0, 3, 2, 0, 1, 3, 0]
    predictor = ClassifyPredictor()
    predictor.weights = class_weights([0] * 5 + [1] * 2 + [2] + [3] * 3, 4)
    loss, gradient, stats = loss_of(predictor, logits, batch_of(labels, broken=[4]), smoothing)
    dense = logits.double().requires_grad_()
    targets = (1 - smoothing) * F.one_hot(torch.tensor(labels), 4) + smoothing / 4
    rows = -(targets * predictor.weights.double() * dense.log_softmax(-1)).sum(-1)
    wanted = rows[[0, 1, 2, 3, 5, 6]].sum() / 6
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.allclose(gradient.double(), torch.autograd.grad(wanted, dense)[0], atol=1e-7)
    assert gradient[4].abs().max() == 0 and stats["count"] == 6


def test_a_batch_that_is_cut_keeps_its_weighted_gradient():
    """Torch's own mean would not: it divides each piece by the weights of its labels."""
    logits, labels = torch.randn(6, 3), [0, 0, 1, 2, 2, 2]
    predictor = ClassifyPredictor()
    predictor.weights = class_weights(labels, 3)
    _, whole, _ = loss_of(predictor, logits, batch_of(labels))
    pieces = [loss_of(predictor, logits[rows], batch_of(labels[rows])) for rows in (slice(0, 2), slice(2, 6))]
    cut = torch.cat([gradient * len(gradient) / 6 for _, gradient, _ in pieces])
    assert torch.allclose(whole, cut, atol=1e-7)


def test_two_accumulated_batches_are_one_of_twice_the_size_with_class_weights(tiny, tmp_path, monkeypatch):
    data = write_photos(tmp_path / "photos", train=6, val=2)
    for file in sorted((data / "train" / "class_0").iterdir())[1:]:
        file.unlink()
    runs = [tmp_path / name for name in ("one", "two", "plain")]
    plain = ["--opt", "sgd", "--lr", "0.1", "--amp", "fp32", "--class-weights", "auto"]
    for run, more in zip(runs, ([8, 1], [4, 2], [8, 1]), strict=True):
        run_quickly(words(tiny, data, run, *plain, "--batch-size", more[0], "--grad-accum-steps", more[1]), monkeypatch)
        plain = ["--class-weights", "none", *plain[:-2]] if run == runs[1] else plain
    one, two, other = (adapter(run) for run in runs)
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6
    assert max((one[name] - other[name]).abs().max() for name in one) > 1e-4


def adapter(run):
    return load_file(run / "adapter_model.safetensors")


@pytest.mark.parametrize("metric, wanted", [("accuracy", 2), ("balanced", 3), ("f1", 1), ("map", 4), ("loss", 2)])
def test_the_best_epoch_has_the_largest_metric_or_the_smallest_loss(metric, wanted):
    rows = [
        {"epoch": 1, "val_loss": 0.5, "accuracy": 0.5, "balanced": 0.4, "f1": 0.9, "map": 0.1},
        {"epoch": 2, "val_loss": 0.2, "accuracy": 0.8, "balanced": 0.4, "f1": 0.3, "map": None},
        {"epoch": 3, "val_loss": 0.2, "accuracy": 0.8, "balanced": 0.7, "f1": 0.4, "map": 0.2},
        {"epoch": 4, "val_loss": 0.9, "accuracy": 0.1, "balanced": 0.2, "f1": 0.1, "map": 0.3},
        {"epoch": 5, "val_loss": None, "accuracy": 0.9, "balanced": 0.9, "f1": 0.9, "map": 0.9},
    ]
    best = None
    for row in rows:
        best = row if state.better(row, best, metric) else best
    assert best["epoch"] == wanted


def test_a_run_keeps_the_epoch_that_its_metric_chose_and_resumes_with_no_other(tiny, tmp_path, monkeypatch, capsys):
    data, run = write_photos(tmp_path / "photos", train=5, val=4), tmp_path / "run"
    assert train.main(words(tiny, data, run, "--metric", "loss", "--lr", "0.3", "--epochs", "4")) == 0
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert summary["best"]["val_loss"] == min(row["val_loss"] for row in rows) and summary["metric"] == "loss"
    assert f"result: loss {summary['best']['val_loss']:.4f} (val, 12 pictures)" in capsys.readouterr().out
    assert {"balanced", "f1"} <= rows[0].keys()
    assert f"| loss | validation {summary['best']['val_loss']:.4f}, best epoch" in (run / "README.md").read_text()
    with pytest.raises(UserError, match="--metric loss there, accuracy here"):
        train.main(words(tiny, data, run, "--metric", "accuracy", "--lr", "0.3", "--epochs", "4"))
    evaluate.main([str(run), "--predictions", str(tmp_path / "p.csv")])
    said = list(csv.DictReader(open(tmp_path / "p.csv")))
    score = balanced_accuracy_score([row["file"].split("/")[1] for row in said], [row["label"] for row in said])
    assert f"balanced accuracy {100 * score:.2f} %" in capsys.readouterr().out


def test_keep_checkpoints_leaves_the_newest(tiny, tmp_path, monkeypatch):
    data = write_photos(tmp_path / "photos", train=4, val=2)
    for keep in (1, 3):
        run = tmp_path / f"run{keep}"
        run_quickly(words(tiny, data, run, "--save-every", 1, "--keep-checkpoints", keep), monkeypatch)
        assert [path.name for path in checkpoint_dirs(run)] == ["step-6", "step-5", "step-4"][:keep]
    run_quickly(words(tiny, data, tmp_path / "run3", "--save-every", 1, "--keep-checkpoints", 2), monkeypatch)


# ---- several labels


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_several_labels_is_torchs_mean_bce(smoothing):
    logits, labels = 2 * torch.randn(5, 3), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]])
    loss, gradient, stats = loss_of(MultiLabelPredictor(), logits, batch_of(labels, broken=[2]), smoothing)
    dense, kept = logits.double().requires_grad_(), [0, 1, 3, 4]
    wanted = nn.BCEWithLogitsLoss()(dense[kept], (1 - smoothing) * labels[kept].double() + smoothing / 2)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.allclose(gradient.double(), torch.autograd.grad(wanted, dense)[0], atol=1e-7)
    right = ((logits > 0).long() == labels).all(-1)[kept].sum()
    assert (stats["correct"], stats["count"]) == (right, 4)


@pytest.fixture(scope="module")
def several(tiny, tmp_path_factory):
    """(run, data) of a small run with several labels, val and test in the table."""
    folder = tmp_path_factory.mktemp("several")
    data, run = write_scenes(folder / "data", train=40, val=20, test=15), folder / "run"
    more = ["--multi-label", "--lr", "0.05", "--lora-plus", "4", "--amp", "fp32"]
    assert train.main(words(tiny, data, run, *more)) == 0
    return run, data


def answers_of(run, data, part, path):
    """(labels (N, K), predictions.csv's rows, probabilities (N, K)) of a part, by hand."""
    model = load_run(run)
    with open(data) as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == part]
    truth = np.array([[label in row["labels"].split(";") for label in model.labels] for row in rows])
    assert evaluate.main([str(run), "--split", part, "--predictions", str(path)]) == 0
    said = {row["file"]: row for row in csv.DictReader(open(path))}
    model.__dict__["threshold"] = -1.0  # all labels
    every = [dict(answer) for answer in model.predict([data.parent / row["file"] for row in rows])]
    return (
        truth,
        [said[row["file"]] for row in rows],
        np.array([[one[label] for label in model.labels] for one in every]),
    )


def test_scores_threshold_and_predictions_of_a_run_are_sklearns(several, tmp_path, capsys):
    run, data = several
    summary = json.loads((run / "summary.json").read_text())
    threshold = summary["best"]["threshold"]
    for part, scores in (("val", summary["best"]), ("test", summary["test"])):
        truth, said, probabilities = answers_of(run, data, part, tmp_path / "p.csv")
        printed = capsys.readouterr().out
        assert scores["threshold"] == threshold
        assert scores["map"] == pytest.approx(mean_ap(truth, probabilities), abs=1e-6)
        assert scores["f1"] == pytest.approx(f1_score(truth, probabilities > threshold, average="micro"), abs=1e-6)
        assert f"mean average precision {100 * scores['map']:.2f} % | F1 {100 * scores['f1']:.2f} %" in printed
        labels = load_run(run).labels
        for row, own in zip(said, probabilities, strict=True):
            above = {label: p for label, p in zip(labels, own, strict=True) if p > threshold}
            cells = dict(zip(row["labels"].split(";"), row["probabilities"].split(";"), strict=True)) if above else {}
            assert cells.keys() == above.keys() and list(cells.values()) == sorted(cells.values(), reverse=True)
            assert all(float(cells[label]) == pytest.approx(p, abs=1e-5) for label, p in above.items())
    assert summary["metric"] == "map" and "lora_B 4 times that" in (run / "train.log").read_text()


def mean_ap(truth, probabilities):
    there = truth.any(0)
    return average_precision_score(truth[:, there], probabilities[:, there])


def test_a_picture_gets_the_labels_above_the_threshold_and_says_where_there_are_none(several, capsys):
    run, data = several
    model, picture = load_run(run), str(data.parent / "val_0000.png")
    every = dict(model.predict([picture])[0])
    assert every and min(every.values()) > model.threshold
    assert evaluate.main([str(run), "--image", picture]) == 0
    assert capsys.readouterr().out == f"{picture}: {', '.join(f'{k} {100 * p:.1f} %' for k, p in every.items())}\n"
    model.__dict__["threshold"] = 1.0
    assert model.predict([picture]) == [[]]


def test_the_page_and_the_comparison_speak_of_average_precision(several, tmp_path, capsys):
    run, data = several
    assert evaluate.main([str(run), "--report", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    for text in ("Average precision per class", '<th class="n">AP %</th>', "mean average precision", "all labels"):
        assert text in page, text
    assert "Confusion" not in page and "weighted recall" not in page
    assert "| mean average precision | validation" in (run / "README.md").read_text()


def test_predictions_without_labels_and_a_table_of_columns(several, tmp_path, capsys):
    run, data = several
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "x.png").write_bytes((data.parent / "val_0001.png").read_bytes())
    assert evaluate.main([str(run), "--data-dir", str(pictures), "--predictions", str(tmp_path / "p.csv")]) == 0
    assert "1 pictures without labels" in capsys.readouterr().out
    other = write_scenes(tmp_path / "other", "columns", train=0, val=20)
    assert evaluate.main([str(run), "--data-dir", str(other)]) == 0
    score = json.loads((run / "summary.json").read_text())["best"]["map"]
    assert f"mean average precision {100 * score:.2f} %" in capsys.readouterr().out


def test_a_stopped_run_of_several_labels_ends_with_the_bits_of_one_that_was_not(tiny, tmp_path, monkeypatch):
    data = write_scenes(tmp_path / "data", "columns", train=12, val=6)
    own = [
        "--multi-label",
        "--lora-dropout",
        "0.2",
        "--augment",
        "basic",
        "--lora-plus",
        "3",
        "--keep-checkpoints",
        "1",
    ]
    command = [word for word in words(tiny, data, "OUT", *own) if word not in ("--output", "OUT")]
    assert resumed_equals_whole(command, tmp_path, monkeypatch, every=2) == 6
    assert {"map", "f1", "threshold", "accuracy"} <= bits(tmp_path / "whole")["rows"][0].keys()


def test_an_exported_model_says_that_its_classes_do_not_exclude_each_other(several, tmp_path):
    transformers = pytest.importorskip("transformers")
    run, data = several
    assert evaluate.main([str(run), "--merge-to", str(tmp_path / "out"), "--layout", "transformers"]) == 0
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == "multi_label_classification"
    pictures = torch.randn(2, 3, 16, 16)
    own = load_run(run)
    assert torch.allclose(model(pictures).logits, own.model(pictures), atol=1e-5)
    assert load_pretrained(tmp_path / "out").labels == own.labels


def test_cached_features_train_the_head_of_several_labels_to_the_same_bits(tiny, tmp_path, monkeypatch):
    data = write_scenes(tmp_path / "data")
    for name, more in (("plain", []), ("cached", ["--cache-features"])):
        run_quickly(
            words(tiny, data, tmp_path / name, "--multi-label", "--mode", "linear", "--amp", "fp32", *more), monkeypatch
        )
    one, two = (adapter(tmp_path / name) for name in ("plain", "cached"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6


@pytest.mark.parametrize(
    "more, told",
    [
        ("--multi-label --metric balanced", "--metric balanced reckons with one class for each picture; leave it out"),
        ("--multi-label --class-weights auto", "--class-weights auto reckons with one class"),
        ("--multi-label --shots 4", "--shots reckons with one class"),
        ("--multi-label --head names", "--head names reckons with one class"),
        ("--multi-label --teacher x", "--teacher reckons with one class"),
        ("--multi-label --task vqa", "--multi-label does not apply to --task vqa; it belongs to --task classify"),
        ("--multi-label --task choice", "--multi-label does not apply to --task choice"),
        ("--class-weights auto --task vqa", "--class-weights does not apply to --task vqa"),
        ("--class-weights auto --task choice", "--class-weights does not apply to --task choice"),
        ("--class-weights yes", "--class-weights must be one of none, auto"),
        ("--metric map", "--metric map is the mean average precision of --multi-label"),
        ("--metric f1 --task vqa", "--metric f1 does not apply to --task vqa; use accuracy or loss"),
        ("--metric balanced --task choice", "--metric balanced does not apply to --task choice"),
        ("--metric acc", "did you mean accuracy?"),
        ("--lora-plus 0", "--lora-plus must be a number above 0"),
        ("--lora-plus 16 --mode full", "no effect with --mode full"),
        ("--keep-checkpoints 0", "--keep-checkpoints must be a whole number at least 1"),
        ("--seeds 1 1", "--seeds takes different whole numbers"),
        ("--seeds 1 x", "--seeds must be a whole number from 0 to 2147483648, got 'x'"),
        ("--seeds", "--seeds needs a value"),
        ("--seeds 1 --seed 2", "--seed and --seeds both name the seed"),
        ("--seeds 1 2 --resume runs/a", "--resume runs/a is for one run"),
        ("--seeds 1 2 --resume never", "--resume never is for one run"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_by_name(more, told):
    with pytest.raises(UserError) as error:
        parse_args(more.split())
    assert told in str(error.value) and "\n" not in str(error.value)


def test_seeds_under_torchrun_and_a_teacher_of_several_labels_are_refused(several, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start one for each --seed"):
        parse_args(["--seeds", "0", "1"])
    monkeypatch.delenv("WORLD_SIZE")
    run, data = several
    labels = load_run(run).labels
    one = "file,label\n" + "".join(f"val_000{i}.png,{labels[i % 2]}\n" for i in range(4))
    (data.parent / "one.csv").write_text(one)
    with pytest.raises(UserError, match="gives several labels; the student's loss reckons with one class"):
        train.main(words(tiny, data.parent / "one.csv", tmp_path / "run", "--teacher", run, "--val-split", "0.5"))


def test_shards_of_several_labels_are_refused_in_both_directions(tiny, tmp_path):
    with pytest.raises(UserError, match="--multi-label: shards hold one label for each picture"):
        shards.main(["photos", str(tmp_path / "x"), "--multi-label"])
    data, target = write_photos(tmp_path / "photos"), tmp_path / "shards"
    assert shards.main([str(data), str(target), "--model", str(tiny), "--wide", "0"]) == 0
    with pytest.raises(UserError, match="--multi-label: .*shards.* name a table"):
        train.main(words(tiny, target, tmp_path / "run", "--multi-label"))


def test_a_clip_gets_a_linear_head_for_several_labels(tmp_path):
    data = write_scenes(tmp_path, train=10, val=5)
    config, _ = parse_args(["--model", "clip-nano", "--multi-label", "--data-dir", str(data), "--device", "cpu"])
    task = build(config)
    assert config.head == "linear" and task.metric == "map" and len(task.labels) == task.model.head.out_features


# ---- seeds


def test_seeds_are_runs_of_their_own_with_one_table_at_the_end(tiny, tmp_path, capsys, monkeypatch):
    data = write_photos(tmp_path / "photos", train=4, val=2)
    base = words(tiny, data, tmp_path / "run", "--epochs", "1")
    (tmp_path / "run-seed-2").mkdir()
    (tmp_path / "run-seed-2" / "mine.txt").write_text("not a run")
    assert train.main([*base, "--seeds", "0", "2", "5"]) == 1
    printed = capsys.readouterr()
    assert "failed: run-seed-2: --output" in printed.err and "3 of 3: run-seed-5" in printed.err
    found = {seed: json.loads((tmp_path / f"run-seed-{seed}" / "summary.json").read_text()) for seed in (0, 5)}
    scores = [100 * one["best"]["accuracy"] for one in found.values()]
    mean = f"{np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f}"
    lines = printed.out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == ["run-seed-0", "run-seed-5", "run-seed-0 (2 seeds)"]
    assert mean in lines[4] and lines[-1].endswith("--report report.html")
    assert evaluate.main([str(tmp_path / "run-seed-0"), str(tmp_path / "run-seed-5")]) == 0
    assert "run-seed-0 (2 seeds)" in capsys.readouterr().out
    run_quickly([*words(tiny, data, tmp_path / "alone", "--epochs", "1"), "--seed", "5"], monkeypatch)
    assert adapter(tmp_path / "alone").keys() and all(
        torch.equal(tensor, adapter(tmp_path / "run-seed-5")[name])
        for name, tensor in adapter(tmp_path / "alone").items()
    )


def test_a_mistake_of_all_seeds_is_said_once_and_a_dry_run_is_one(tiny, tmp_path, capsys):
    with pytest.raises(UserError, match="no such folder"):
        train.main(words(tiny, tmp_path / "nothing", tmp_path / "run", "--seeds", "0", "1"))
    data = write_photos(tmp_path / "photos")
    assert train.main(words(tiny, data, tmp_path / "run", "--seeds", "0", "1", "--dry-run")) == 0
    assert not list(tmp_path.glob("run*")) and "steps:" in capsys.readouterr().out
