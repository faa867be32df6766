"""Classification metrics against scikit-learn, and the tables that compare runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.report.metrics import classification_metrics, format_metrics, most_confused
from minilora.report.tables import RunRow, comparison_table, group_key, group_runs, markdown_table, text_table

pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_all_averages_and_classes_equal_sklearn_also_where_a_class_never_occurs(rows):
    sk = pytest.importorskip("sklearn.metrics")
    true, predicted = np.array(rows).T
    ours = classification_metrics(true, predicted, list("abcde"))
    p, r, f, s = sk.precision_recall_fscore_support(true, predicted, labels=range(5), zero_division=0)
    for key, column in {"precision": p, "recall": r, "f1": f, "support": s}.items():
        assert np.allclose([row[key] for row in ours["per_class"]], column, atol=1e-12), key
    for average, prefix in (("weighted", ""), ("macro", "macro_")):
        values = sk.precision_recall_fscore_support(true, predicted, average=average, zero_division=0)[:3]
        assert np.allclose([ours[prefix + key] for key in ("precision", "recall", "f1")], values, atol=1e-12)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(true, predicted), abs=1e-12)
    assert ours["confusion"] == sk.confusion_matrix(true, predicted, labels=range(5)).tolist()


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_weighted_recall_is_the_accuracy(rows):
    true, predicted = np.array(rows).T
    metrics = classification_metrics(true, predicted, list("abcde"))
    assert metrics["recall"] == pytest.approx(metrics["accuracy"], abs=1e-12)


def test_rows_without_a_label_are_left_out_and_counted():
    metrics = classification_metrics([0, -1, 1], [0, 1, 0], ["a", "b"])
    assert (metrics["count"], metrics["unlabelled"], metrics["accuracy"]) == (2, 1, 0.5)
    assert "1 without a label" in format_metrics(metrics)


def test_strings_need_no_class_list_and_an_unknown_truth_is_wrong():
    metrics = classification_metrics(["yes", "zebra", "no"], ["yes", "no", "no"])
    assert metrics["classes"] == ["no", "yes", "zebra"] and metrics["accuracy"] == pytest.approx(2 / 3)
    assert most_confused(metrics) == [("zebra", "no", 1)]


def test_log_loss_and_top5_equal_sklearn():
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    probabilities, true = rng.dirichlet(np.ones(8), 50), rng.integers(0, 8, 50)
    metrics = classification_metrics(true, probabilities.argmax(1), list("abcdefgh"), probabilities)
    assert metrics["log_loss"] == pytest.approx(sk.log_loss(true, probabilities, labels=range(8)))
    expected = sk.top_k_accuracy_score(true, probabilities, k=5, labels=range(8))
    assert metrics["top5_accuracy"] == pytest.approx(expected)


def test_no_rows_at_all_give_zeros_not_a_crash():
    metrics = classification_metrics([], [], ["a", "b"])
    assert metrics["accuracy"] == metrics["f1"] == 0.0 and format_metrics(metrics)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="2 true labels but 1 predictions"):
        classification_metrics([0, 1], [0], ["a", "b"])


def test_many_classes_keep_no_matrix_and_print_the_weakest():
    true = np.arange(300)
    metrics = classification_metrics(true, np.where(true < 2, 5, true), [f"c{i}" for i in true])
    assert metrics["confusion"] is None and most_confused(metrics) == []
    lines = format_metrics(metrics, per_class=3).splitlines()
    assert len(lines) == 2 + 2 + 3 and {lines[4].split()[0], lines[5].split()[0]} == {"c0", "c1"}


def test_seeds_of_equal_configuration_are_averaged_with_their_spread():
    group = group_key({"lr": 1e-3, "seed": 0, "output": "x"})
    assert group == group_key({"seed": 7, "lr": 1e-3}) != group_key({"lr": 1e-4})
    rows = [RunRow("lora", "lora", group, s, accuracy=a, trainable=10, total=100) for s, a in enumerate((0.9, 0.92))]
    rows.append(RunRow("full", "full", "other", 0, accuracy=0.5, seconds=3.0))
    assert [len(g.runs) for g in group_runs(rows)] == [2, 1]
    table = comparison_table(rows)
    assert "91.00 ± 1.41" in table and "lora (2 seeds)" in table and "10 (10.00 %)" in table
    assert "peak memory" not in table  # a column that nobody fills is left out
    assert "50.00" in table and table.count("±") == 1  # one run has no spread


def test_a_table_names_its_metric_and_keeps_different_metrics_apart():
    one = RunRow("a", "lora", accuracy=0.5, metric="exact match after normalisation")
    assert "exact match after normalisation %" in comparison_table([one])
    both = comparison_table([one, RunRow("b", "lora", accuracy=0.4, metric="official VQA accuracy")])
    assert "official VQA accuracy" in both and "exact match after normalisation" in both


def test_text_and_markdown_tables_are_aligned_and_escaped():
    lines = text_table(["name", "n"], [["a", 1], ["long name", 100]]).splitlines()
    assert lines[2] == "a            1" and lines[3] == "long name  100"
    assert markdown_table(["x|y"], [["a|b"]]).splitlines()[2] == "| a\\|b |"
