"""Accuracy, precision, recall and F1 of a classifier, in numpy alone.

For a class c with tp rows rightly called c, fp rows wrongly called c and fn missed rows of c:

    precision = tp / (tp + fp)      recall = tp / (tp + fn)      F1 = 2 tp / (2 tp + fp + fn)

with 0 where a denominator is 0. The weighted averages weigh each class by its support tp + fn, so
that the weighted recall is sum_c tp_c / N: it equals the accuracy, always. Balanced accuracy is the
plain mean of recall over the classes that occur. The numbers are those of scikit-learn's
`precision_recall_fscore_support(..., zero_division=0)` and `balanced_accuracy_score`.
"""

import math
from collections.abc import Sequence

import numpy as np

from minilora.report.tables import text_table

# a confusion matrix of more classes is not kept: it would be megabytes that nobody reads
CONFUSION_LIMIT = 200
MANY = 2000  # scored rows from which on an accuracy is printed without its standard error
# what a --metric is called
NAMES = {"accuracy": "accuracy", "balanced": "balanced accuracy", "f1": "F1", "map": "mean average precision"}
CLASS_COLUMNS = {"AP %": "ap", "precision %": "precision", "recall %": "recall", "F1 %": "f1"}


def confusion_matrix(true: np.ndarray, predicted: np.ndarray, n: int) -> np.ndarray:
    """(N,), (N,) indices in 0..n-1 -> (n, n) counts; row = truth, column = prediction."""
    return np.bincount(np.asarray(true) * n + np.asarray(predicted), minlength=n * n).reshape(n, n)


def classification_metrics(
    true: Sequence, predicted: Sequence, classes: Sequence[str] | None = None, probabilities: np.ndarray | None = None
) -> dict:
    """All metrics of N rows as one plain dictionary, ready for JSON.

    With `classes`, `true` and `predicted` (N,) are indices into it, and rows with truth -1 (no
    label) are left out. Without, they are strings, and the classes are all that occur on
    either side, sorted: a truth that the model cannot answer is then a class of its own and
    counts as wrong. `probabilities` (N, K) adds `top5_accuracy` (where K > 5) and `log_loss`,
    the mean of -log p(truth).

    Keys: count, unlabelled, accuracy, balanced, precision, recall, f1 (weighted), macro_precision,
    macro_recall, macro_f1, classes, per_class (list of class, precision, recall, f1, support,
    predicted) and confusion (None above 200 classes).
    """
    if classes is None:
        classes, indices = np.unique([*map(str, true), *map(str, predicted)], return_inverse=True)
        classes, true, predicted = classes.tolist(), indices[: len(true)], indices[len(true) :]
    true, predicted = np.asarray(true, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    if true.shape != predicted.shape:
        raise ValueError(f"classification_metrics: {len(true)} true labels but {len(predicted)} predictions")
    known, n = true >= 0, len(classes)
    unlabelled, true, predicted = int((~known).sum()), true[known], predicted[known]
    result = {"count": len(true), "unlabelled": unlabelled, **_scores(true, predicted, n, classes)}
    if probabilities is not None and len(true):
        result |= _probability_scores(true, np.asarray(probabilities, dtype=np.float64)[known])
    return result


def _scores(true: np.ndarray, predicted: np.ndarray, n: int, classes: Sequence[str]) -> dict:
    right = true == predicted
    tp = np.bincount(true[right], minlength=n)  # (n,)
    support, called = np.bincount(true, minlength=n), np.bincount(predicted, minlength=n)
    columns = shares(tp, called, support)
    # scikit-learn's macro average also skips classes that never occur
    present = (support + called) > 0
    per_class = [
        {"class": str(name), **{key: float(column[i]) for key, column in columns.items()}}
        | {"support": int(support[i]), "predicted": int(called[i])}
        for i, name in enumerate(classes)
    ]
    return {
        "accuracy": float(right.mean()) if len(true) else 0.0,
        "balanced": float(columns["recall"][support > 0].mean()) if len(true) else 0.0,
        **{key: float(_ratio((column * support).sum(), support.sum())) for key, column in columns.items()},
        **{f"macro_{key}": float(column[present].mean()) if present.any() else 0.0 for key, column in columns.items()},
        "classes": [str(name) for name in classes],
        "per_class": per_class,
        "confusion": confusion_matrix(true, predicted, n).tolist() if n <= CONFUSION_LIMIT else None,
    }


def shares(tp: np.ndarray, called: np.ndarray, support: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 from the counts of right calls, of calls and of what there was."""
    return {"precision": _ratio(tp, called), "recall": _ratio(tp, support), "f1": _ratio(2 * tp, called + support)}


def _probability_scores(true: np.ndarray, probabilities: np.ndarray) -> dict:
    of_truth = probabilities[np.arange(len(true)), true][:, None]  # (N, 1)
    result = {"log_loss": float(-np.log(np.clip(of_truth, 1e-12, 1)).mean())}
    if probabilities.shape[1] > 5:
        result["top5_accuracy"] = float(((probabilities > of_truth).sum(1) < 5).mean())
    return result


def _ratio(part, whole) -> np.ndarray:
    """part / whole, 0 where whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)


def percent(share: float | None, count: int = 0, spread: float | None = None) -> str:
    """ "89.58 % ± 4.41": a share and, of fewer than 2,000 rows, its standard error sqrt(p (1 - p) /
    N); where rows count in part, their standard deviation `spread` / sqrt(N)."""
    if share is None or not math.isfinite(share):
        return "not known"
    deviation = math.sqrt(max(share * (1 - share), 0)) if spread is None else spread
    return f"{100 * share:.2f} %" + (f" ± {100 * deviation / math.sqrt(count):.2f}" if 0 < count < MANY else "")


def shown(metric: str, value: float | None, count: int = 0) -> str:
    """A value of --metric: a share in percent, an accuracy with its standard error, or a loss."""
    if metric == "loss" and value is not None:
        return f"{value:.4f}"
    return percent(value, count if metric == "accuracy" else 0)


def most_confused(metrics: dict, n: int = 10) -> list[tuple[str, str, int]]:
    """The n largest off-diagonal entries of the confusion matrix as (truth, prediction, count)."""
    matrix = np.array(metrics["confusion"] if metrics["confusion"] is not None else [[0]])
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:n]
    pairs = zip(*np.unravel_index(order, matrix.shape), strict=True)
    names = metrics["classes"]
    return [(names[i], names[j], int(matrix[i, j])) for i, j in pairs if matrix[i, j]]


def headline(metrics: dict) -> list[str]:
    """The averages of a classifier, each with its name."""
    parts = [f"accuracy {percent(metrics['accuracy'], metrics['count'])}"]
    if "top5_accuracy" in metrics:
        parts.append(f"top-5 accuracy {percent(metrics['top5_accuracy'])}")
    parts += [weighted_line(metrics), *([f"log loss {metrics['log_loss']:.4f}"] if "log_loss" in metrics else [])]
    return [*parts, f"{metrics['count']} rows", f"balanced accuracy {percent(metrics['balanced'])}"]


def format_metrics(metrics: dict, per_class: int = 50, parts: Sequence[str] = ()) -> str:
    """`parts` (else `headline`) in a line, then a table of the classes, of many the weakest."""
    head = " | ".join(parts or headline(metrics))
    if metrics["unlabelled"]:
        head += f" | {metrics['unlabelled']} without a label, left out"
    rows = metrics["per_class"]
    if len(rows) > per_class:
        rows = sorted((row for row in rows if row["support"]), key=lambda row: row["f1"])[:per_class]
        head += f"\nthe {len(rows)} classes with the lowest F1 of {len(metrics['per_class'])}:"
    return head + "\n" + text_table(*class_table(rows))


def class_table(rows: Sequence[dict], digits: int = 2) -> tuple[list[str], list[list]]:
    """(titles, cells) of rows of `per_class`; an empty cell for an AP that is not defined."""
    keys = {title: key for title, key in CLASS_COLUMNS.items() if rows and key in rows[0]}
    cells = [["" if r[key] is None else f"{100 * r[key]:.{digits}f}" for key in keys.values()] for r in rows]
    table = [[row["class"], *middle, row["support"]] for row, middle in zip(rows, cells, strict=True)]
    return ["class", *keys, "support"], table


def weighted_line(metrics: dict) -> str:
    """The averages over the classes, each weighed by its support, in percent."""
    names = {"precision": "precision", "recall": "recall", "F1": "f1"}
    return "weighted " + ", ".join(f"{name} {percent(metrics[key])}" for name, key in names.items())
