"""Several labels: AP, mAP, F1, accuracy and the threshold against scikit-learn; balanced accuracy too."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, f1_score
from sklearn.metrics import precision_recall_fscore_support as prfs

from minilora.report.metrics import classification_metrics, format_metrics
from minilora.report.multilabel import average_precision, best_threshold, headline, multilabel_metrics


def drawn(seed: int, n: int = 60, k: int = 5, steps: int = 0):
    """Labels of which each class has some, and scores that tell a little; `steps`: only so many different ones."""
    rng = np.random.default_rng(seed)
    truth = rng.random((n, k)) < np.linspace(0.05, 0.6, k)
    truth[np.arange(k), np.arange(k)] = True
    scores = 1 / (1 + np.exp(-(rng.normal(size=(n, k)) + 1.5 * truth - 0.7)))
    return truth, (np.round(scores * steps) / steps if steps else scores).astype(np.float32)


@pytest.mark.parametrize("steps", [0, 4, 1])
def test_average_precisions_equal_sklearns_also_where_scores_are_equal(steps):
    truth, scores = drawn(steps, steps=steps)
    ours = multilabel_metrics(truth, scores, list("abcde"))
    theirs = average_precision_score(truth, scores, average=None)
    assert np.allclose([row["ap"] for row in ours["per_class"]], theirs, atol=1e-12)
    assert ours["map"] == pytest.approx(average_precision_score(truth, scores, average="macro"), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30))
def test_average_precision_of_any_short_list_is_sklearns(pairs):
    truth, scores = np.array([t for t, _ in pairs]), np.array([s / 5 for _, s in pairs])
    found = average_precision(truth, scores)
    assert found == (pytest.approx(average_precision_score(truth, scores), abs=1e-12) if truth.any() else None)


@pytest.mark.parametrize("steps", [0, 7])
def test_the_threshold_has_the_largest_f1_of_all_there_are(steps):
    truth, scores = drawn(2, steps=steps)
    threshold = best_threshold(truth, scores)
    found = f1_score(truth, scores.astype(np.float64) > threshold, average="micro")
    every = [f1_score(truth, scores >= level, average="micro") for level in np.unique(scores)]
    assert found == max(every) and min(every) < max(every) - 0.05
    assert threshold not in scores and multilabel_metrics(truth, scores, list("abcde"))["threshold"] == threshold


def test_the_threshold_lies_between_neighbours_that_float32_just_tells_apart():
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1))
    truth, scores = np.array([[True, False]]), np.array([[high, low]])
    found = multilabel_metrics(truth, scores, ["a", "b"])
    assert float(low) < found["threshold"] < float(high) and found["f1"] == found["accuracy"] == 1


def test_f1_precision_recall_and_accuracy_equal_sklearns_above_the_threshold():
    truth, scores = drawn(5)
    ours, said = multilabel_metrics(truth, scores, list("abcde"), 0.4), scores > 0.4
    for average, keys in (("micro", ("precision", "recall", "f1")), ("macro", (None, None, "macro_f1"))):
        for key, value in zip(keys, prfs(truth, said, average=average, zero_division=0), strict=False):
            assert key is None or ours[key] == pytest.approx(value, abs=1e-12), key
    each = prfs(truth, said, average=None, zero_division=0)
    for key, column in zip(("precision", "recall", "f1", "support"), each, strict=True):
        assert np.allclose([row[key] for row in ours["per_class"]], column, atol=1e-12), key
    assert ours["accuracy"] == accuracy_score(truth, said) and 0 < ours["accuracy"] < 1


def test_a_class_that_never_occurs_has_no_ap_and_does_not_count():
    truth, scores = drawn(3, k=3)
    truth[:, 1] = False
    found = multilabel_metrics(truth, scores, ["a", "b", "c"])
    assert found["per_class"][1]["ap"] is None
    assert found["map"] == pytest.approx(average_precision_score(truth[:, [0, 2]], scores[:, [0, 2]]), abs=1e-12)
    text = format_metrics(found, parts=headline(found))
    assert text.startswith(f"mean average precision {100 * found['map']:.2f} % | F1 ")
    assert text.splitlines()[1].split()[:3] == ["class", "AP", "%"] and text.splitlines()[4].split()[0] == "b"
    nothing = multilabel_metrics(truth & False, scores, ["a", "b", "c"])
    assert nothing["threshold"] == 0.5 and np.isnan(nothing["map"])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=40))
def test_balanced_accuracy_is_sklearns_also_where_classes_are_only_called(rows):
    true, said = zip(*rows, strict=True)
    found = classification_metrics(true, said, list("abcdef"))["balanced"]
    with np.errstate(all="ignore"):
        assert found == pytest.approx(balanced_accuracy_score(true, said), abs=1e-12)
