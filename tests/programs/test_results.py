"""Export needs no data, evaluation leaves a run's files alone, and every printed number says what it is."""

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from minilora.errors import UserError
from minilora.report.metrics import classification_metrics, format_metrics, percent
from minilora.report.vqa_metric import format_vqa, score_vqa
from reference_models import ModelError, load_pretrained
from tests.support.tiny_tasks import evaluate, train, write_tasks

TASKS = ("classify", "vqa", "choice")
ACCURACY = r"accuracy \d+\.\d\d % ± \d+\.\d\d"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each task, {task: (run, data)}."""
    root = tmp_path_factory.mktemp("results")
    found = {}
    for task, words in write_tasks(root).items():
        assert train.main([*words, "--epochs", "1", "--output", str(root / f"run-{task}")]) == 0
        found[task] = root / f"run-{task}", Path(words[words.index("--data-dir") + 1])
    return found


def digests(run):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.iterdir() if path.is_file()}


@pytest.mark.parametrize("task", TASKS)
def test_an_export_alone_needs_no_data_and_scores_nothing(runs, task, tmp_path, monkeypatch, capsys):
    run, data = runs[task]
    away = data.rename(tmp_path / "away")
    try:
        layout = "minilora" if task == "vqa" else "transformers"
        assert evaluate.main([str(run), "--merge-to", str(tmp_path / "out"), "--layout", layout]) == 0
        assert capsys.readouterr().out.splitlines() == [f"wrote {tmp_path / 'out'}"]
        assert load_pretrained(tmp_path / "out") is not None
        if task != "vqa":
            adapter = ["--export-adapter", str(tmp_path / "adapter"), "--spectrum"]
            assert evaluate.main([str(run), *adapter]) == 0 and "accuracy" not in capsys.readouterr().out
        with pytest.raises(UserError, match="no such folder"):  # scores were asked for
            evaluate.main([str(run), "--merge-to", str(tmp_path / "more"), "--layout", layout, "--split", "val"])
    finally:
        away.rename(data)
    scored = ["--merge-to", str(tmp_path / "scored"), "--layout", layout, "--predictions", str(tmp_path / "p.csv")]
    assert evaluate.main([str(run), *scored]) == 0 and re.search(ACCURACY, capsys.readouterr().out)


def test_layouts_are_checked_before_anything_runs_and_all_are_named(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "score", lambda *_: pytest.fail("scored before the layout was checked"))
    monkeypatch.setattr(evaluate, "extras", lambda *_: pytest.fail("computed before the layout was checked"))
    (classify, _), (vqa, _) = runs["classify"], runs["vqa"]
    asked = ["--split", "val", "--spectrum", "--layout", "open_clip"]
    with pytest.raises(ModelError, match="it knows minilora, transformers4, .*timm, .*transformers"):
        evaluate.main([str(classify), "--merge-to", str(tmp_path / "x"), *asked])
    with pytest.raises(UserError, match="not known to this model; it has transformers5, .*, transformers"):
        evaluate.main([str(classify), "--export-adapter", str(tmp_path / "x"), *asked])
    with pytest.raises(ModelError, match="knows minilora$"):
        evaluate.main([str(vqa), "--merge-to", str(tmp_path / "x")])


def test_evaluation_changes_no_file_that_training_wrote(runs, tmp_path, capsys):
    run, _ = runs["classify"]
    other = shutil.copytree(run, tmp_path / "other")
    before = digests(run), digests(other)
    files = ["--report", str(tmp_path / "r.html"), "--predictions", str(tmp_path / "p.csv")]
    assert evaluate.main([str(run), "--attention", "2", "--per-head", "--spectrum", "--latency", *files]) == 0
    assert evaluate.main([str(run), str(other), "--attention", "3", "--spectrum"]) == 0
    assert (digests(run), digests(other)) == before
    assert f"wrote {run / 'evaluation' / 'attention.png'}" in capsys.readouterr().out
    assert {path.name for path in (run / "evaluation").iterdir()} >= {"attention.png"}


@pytest.mark.parametrize("task", TASKS)
def test_every_result_says_which_part_was_scored_and_how_many(runs, task, capsys):
    run, data = runs[task]
    unit = "pictures" if task == "classify" else "questions"
    log = (run / "train.log").read_text()
    assert re.search(rf"result: {ACCURACY} \(val, \d+ {unit}\)", log) and f" {unit}/s " in log
    for words, part in (([], "val"), (["--split", "train"], "train"), (["--data-dir", str(data)], "val")):
        assert evaluate.main([str(run), *words]) == 0
        out = capsys.readouterr().out
        count = re.search(rf"^{re.escape(str(run))} .*: {part}, (\d+) {unit}$", out, re.MULTILINE)[1]
        assert int(count) > 1 and re.search(ACCURACY, out)
        assert not re.search(r"accuracy:? 0\.\d{3}|exact match.*: \d|most common answer: acc", out)
    if task == "classify":
        assert evaluate.main([str(run), "--data-dir", str(data / "train")]) == 0
        assert f"): all, {len(list((data / 'train').rglob('*.png')))} pictures" in capsys.readouterr().out


def test_a_submission_does_not_switch_the_part_and_is_what_its_name_says(runs, tmp_path, capsys):
    for task in ("vqa", "choice"):
        run, _ = runs[task]
        assert evaluate.main([str(run), "--submission", str(tmp_path / f"{task}.csv")]) == 0
        out = capsys.readouterr().out
        rows = list(csv.reader((tmp_path / f"{task}.csv").open()))
        assert f": val, {len(rows) - 1} questions" in out and rows[0] in (["question_id", "answer"], ["ID", "answer"])
    assert evaluate.main([str(runs["vqa"][0]), "--submission", str(tmp_path / "x.json"), "--split", "train"]) == 0
    assert {*json.loads((tmp_path / "x.json").read_text())[0]} == {"question_id", "answer"}
    assert "answers to train" in capsys.readouterr().out


def test_baselines_have_names_of_their_own(runs, capsys):
    for task, names in (("vqa", ["greyed out", "most frequent answer in training"]), ("choice", ["chance 25.00 %"])):
        assert evaluate.main([str(runs[task][0])]) == 0
        out = capsys.readouterr().out
        for name in names:
            assert re.search(rf"baseline: [^|\n]*{name}", out), name
        assert "picture and question" not in out


@pytest.mark.parametrize(
    "share, count, spread, said",
    [
        (43 / 48, 48, None, "89.58 % ± 4.41"),
        (0.5, 100, None, "50.00 % ± 5.00"),
        (1.0, 10, None, "100.00 % ± 0.00"),
        (0.6617, 1999, None, "66.17 % ± 1.06"),
        (0.6617, 2000, None, "66.17 %"),
        (0.25, 0, None, "25.00 %"),
        (0.6, 25, 0.3, "60.00 % ± 6.00"),
        (float("nan"), 3, None, "not known"),
        (None, 3, None, "not known"),
    ],
)
def test_a_share_is_in_percent_with_its_standard_error_where_few_were_scored(share, count, spread, said):
    assert percent(share, count, spread) == said


def test_the_standard_error_is_the_spread_of_repeated_samples():
    """4,000 samples of 50 answers: their accuracies spread as is said of one."""
    draws = np.random.default_rng(0).random((4000, 50)) < 0.7
    said = float(percent(0.7, 50).split("± ")[1])
    assert said == pytest.approx(100 * draws.mean(1).std(), rel=0.05)
    worth = np.random.default_rng(1).choice([0, 0.3, 0.6, 0.9, 1], (4000, 40))
    said = float(percent(worth[0].mean(), 40, worth[0].std()).split("± ")[1])
    assert said == pytest.approx(100 * worth.mean(1).std(), rel=0.2)


def test_numbers_of_classes_and_of_official_vqa_scores_are_percent_too():
    text = format_metrics(classification_metrics([0, 0, 1, 1], [0, 1, 1, 1], ["a", "b"]))
    assert text.startswith("accuracy 75.00 % ± 21.65 | weighted precision 83.33 %, recall 75.00 %, F1 73.33 % | 4 rows")
    assert re.search(r"^a +100.00 +50.00 +66.67 +2$", text, re.MULTILINE)
    answers = [{"answer": "yes"}] * 3 + [{"answer": "no"}] * 7
    asked = [{"question_id": i, "answers": answers, "answer_type": "yes/no"} for i in range(4)]
    said = {0: "yes", 1: "no", 2: "no", 3: "maybe"}
    text = format_vqa(score_vqa(said, asked))
    worth = np.array([0.9, 1, 1, 0])
    assert text.startswith(f"accuracy 72.50 % ± {100 * worth.std() / 2:.2f} (official VQA accuracy) | 4 questions")


def test_time_for_cached_features_counts_in_the_runs_seconds(runs, tmp_path, monkeypatch):
    import time

    from minilora.tasks.classify.task import Classify
    from minilora.tasks.vqa.features import FeatureCache

    kept = Classify.encode, FeatureCache.encode
    monkeypatch.setattr(Classify, "encode", lambda self, part: (time.sleep(0.4), kept[0](self, part))[1])
    monkeypatch.setattr(FeatureCache, "encode", lambda self, data: (time.sleep(0.4), kept[1](self, data))[1])
    for task in ("classify", "vqa"):
        words = write_tasks(tmp_path / task)[task]
        flags = ["--mode", "linear", "--cache-features", "--epochs", "2", "--output", str(tmp_path / task / "run")]
        assert train.main([*words, *flags]) == 0
        rows = [json.loads(line) for line in (tmp_path / task / "run" / "metrics.jsonl").read_text().splitlines()]
        assert rows[0]["seconds"] > 0.4 > rows[1]["seconds"], task
        assert json.loads((tmp_path / task / "run" / "summary.json").read_text())["seconds"] > 0.4
