"""What a classifier's logits on a validation set are worth: a report in plain numbers, and one sentence about it.

Precision, recall and F1 are scikit-learn's (`precision_recall_fscore_support`, zero where nothing is to divide by; the
macro average runs over the labels that occur as truth or prediction). Calibration is after Guo et al. 2017, "On
Calibration of Modern Neural Networks": the expected calibration error over 15 bins of equal width, and the temperature
that logits are divided by so that the negative log-likelihood is the smallest. numpy only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 15
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0  # a model that is right about everything would be sharpened without end
_NUM_HALVINGS = 60

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def report(logits: Floats, truth: Ints, labels: tuple[str, ...]) -> dict[str, Any]:
    """Everything about predictions on `truth` (numbers of labels) from logits [examples, labels]."""
    logits = np.asarray(logits, dtype=np.float64)
    confusion = confusion_matrix(truth, logits.argmax(axis=1), len(labels))
    temperature = fit_temperature(logits, truth)
    return {
        "num_examples": len(truth),
        "accuracy": float(np.trace(confusion) / len(truth)),
        **averages(confusion),
        "per_label": [
            {"label": label, "precision": p, "recall": r, "f1": f, "support": int(n)}
            for label, p, r, f, n in zip(labels, *(x.tolist() for x in scores(confusion)), strict=True)
        ],
        "confusion_matrix": {"labels": list(labels), "rows_are": "truth", "counts": confusion.tolist()},
        "temperature": temperature,
        "calibration": {
            "num_bins": NUM_BINS,
            "before": _calibration(logits, truth),
            "after": _calibration(logits / temperature, truth),
        },
    }


def confusion_matrix(truth: Ints, predicted: Ints, num_labels: int) -> Ints:
    """Counts [truth, prediction]."""
    flat = np.bincount(np.asarray(truth) * num_labels + predicted, minlength=num_labels**2)
    return flat.reshape(num_labels, num_labels).astype(np.int64)


def scores(confusion: Ints) -> tuple[Floats, Floats, Floats, Ints]:
    """Precision, recall, F1 and support of each label."""
    hits, predicted, support = np.diagonal(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    return _ratio(hits, predicted), _ratio(hits, support), _ratio(2 * hits, predicted + support), support


def averages(confusion: Ints) -> dict[str, dict[str, float]]:
    """Macro: each label counts the same. Micro: each example. Weighted: each label as often as it occurs."""
    *each, support = scores(confusion)
    occurs = confusion.sum(axis=0) + support > 0
    accuracy = float(np.trace(confusion) / confusion.sum())  # all three micro averages, with one label per text
    names = ("precision", "recall", "f1")
    weighted = [float(np.average(values, weights=support)) for values in each]
    return {
        "macro": {name: float(values[occurs].mean()) for name, values in zip(names, each, strict=True)},
        "micro": dict.fromkeys(names, accuracy),
        "weighted": dict(zip(names, weighted, strict=True)),
    }


def expected_calibration_error(probabilities: Floats, truth: Ints) -> float:
    """Mean over the examples of how far the confidence of their bin is from its accuracy."""
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)  # (0, 1/15], (1/15, 2/15], …
    gaps = np.bincount(bins, weights=confidence - is_right, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(truth))


def fit_temperature(logits: Floats, truth: Ints) -> float:
    """The temperature of the smallest negative log-likelihood, which is convex in its inverse: halving finds where the
    derivative, the mean of the expected logit less that of the truth, changes its sign."""
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    of_truth = logits[np.arange(len(truth)), truth].mean()
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        slope = (softmax(logits * middle) * logits).sum(axis=1).mean() - of_truth
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(2 / (low + high))


def softmax(logits: Floats) -> Floats:
    """Probabilities along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def summary(found: dict[str, Any]) -> str:
    """One sentence for the job's owner."""
    text = f"Validation: accuracy {found['accuracy']:.3f}, macro-F1 {found['macro']['f1']:.3f}"
    rated = [label for label in found["per_label"] if label["support"]]
    weakest = min(rated, key=lambda label: (label["f1"], label["label"]))
    if weakest["f1"] < 1:
        rows = f"{weakest['support']} row{'' if weakest['support'] == 1 else 's'}"
        text += f"; weakest: {weakest['label']} (F1 {weakest['f1']:.2f}, {rows})"
    before, after = (found["calibration"][when]["expected_calibration_error"] for when in ("before", "after"))
    return f"{text}; calibration error {before:.3f}, {after:.3f} at the temperature {found['temperature']:.2f}."


def _calibration(logits: Floats, truth: Ints) -> dict[str, float]:
    probabilities = softmax(logits)
    of_truth = probabilities[np.arange(len(truth)), truth]
    return {
        "expected_calibration_error": expected_calibration_error(probabilities, truth),
        "negative_log_likelihood": float(-np.log(np.maximum(of_truth, np.finfo(np.float64).tiny)).mean()),
    }


def _ratio(part: Ints, whole: Ints) -> Floats:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
