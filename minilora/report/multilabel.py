"""Several labels for a picture: average precision, and F1 above a threshold, in numpy alone.

With the pictures sorted by their probability for a class, P(n) and R(n) are precision and recall of
the first n; pictures of equal probability come in together.

    AP = sum_n (R(n) - R(n - 1)) P(n)     mAP: its mean over the classes that occur
    F1 = 2 tp / (2 tp + fp + fn)          over all labels of all pictures: those with p > threshold

As scikit-learn's `average_precision_score` and `f1_score(average="micro")`; accuracy is its
`accuracy_score`: the share of pictures that have all their labels and no other.
"""

from collections.abc import Sequence

import numpy as np

from minilora.report.metrics import percent, shares


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float | None:
    """AP of one class; truth (N,) bool, scores (N,). None where the class never occurs."""
    if not truth.any():
        return None
    order = np.argsort(-scores, kind="stable")
    truth, scores = truth[order], scores[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # the last of equal scores
    tp = np.cumsum(truth)[ends]
    return float((np.diff(tp / tp[-1], prepend=0.0) * tp / (ends + 1)).sum())


def best_threshold(truth: np.ndarray, scores: np.ndarray) -> float:
    """The threshold with the largest F1, half-way between two scores; truth (N, K) bool, scores
    (N, K). 0.5 where no label is true."""
    order = np.argsort(-scores, axis=None, kind="stable")
    truth, scores = truth.ravel()[order], np.append(scores.astype(np.float64).ravel()[order], 0.0)
    f1 = 2 * np.cumsum(truth) / (np.arange(1, len(truth) + 1) + truth.sum())
    cut = np.where(scores[:-1] > scores[1:], f1, 0.0).argmax() if truth.any() else None
    return 0.5 if cut is None else float((scores[cut] + scores[cut + 1]) / 2)


def multilabel_metrics(
    truth: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], threshold: float | None = None
) -> dict:
    """All metrics of N pictures and K classes, (N, K) both, as `classification_metrics` gives them;
    without a threshold the best one here. Precision, recall and f1 are over all labels, macro_f1
    is the mean over the classes that occur; besides map, threshold, and `ap` in per_class."""
    truth, threshold = truth > 0, best_threshold(truth > 0, probabilities) if threshold is None else threshold
    said = probabilities.astype(np.float64) > threshold
    tp, called, support = (said & truth).sum(0), said.sum(0), truth.sum(0)
    columns = shares(tp, called, support) | {"support": support, "predicted": called}
    per_class = [
        {"class": str(name), "ap": average_precision(truth[:, k], probabilities[:, k])}
        | {key: column[k].item() for key, column in columns.items()}
        for k, name in enumerate(classes)
    ]
    known = [(row["ap"], row["f1"]) for row in per_class if row["support"]]
    means = np.mean(known, axis=0) if known else (np.nan, np.nan)
    return {
        **{"count": len(truth), "unlabelled": 0, "map": float(means[0]), "threshold": threshold},
        "accuracy": float((said == truth).all(1).mean()) if len(truth) else float("nan"),
        **{key: float(value) for key, value in shares(tp.sum(), called.sum(), support.sum()).items()},
        **{"macro_f1": float(means[1]), "classes": list(classes), "per_class": per_class, "confusion": None},
    }


def headline(metrics: dict) -> list[str]:
    """The averages, each with its name."""
    parts = {"precision": "precision", "recall": "recall", "macro F1": "macro_f1"}
    return [
        f"mean average precision {percent(metrics['map'])}",
        f"F1 {percent(metrics['f1'])} above {metrics['threshold']:.4f}",
        ", ".join(f"{name} {percent(metrics[key])}" for name, key in parts.items()),
        f"all labels right {percent(metrics['accuracy'], metrics['count'])} | {metrics['count']} rows",
    ]
