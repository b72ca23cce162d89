"""The report on a classifier, against numbers worked out by hand (scikit-learn's conventions)."""

from __future__ import annotations

import numpy as np
import pytest

from training.classification_metrics import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    averages,
    confusion_matrix,
    expected_calibration_error,
    fit_temperature,
    report,
    scores,
    softmax,
    summary,
)

TRUTH = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
PREDICTED = np.array([0, 0, 1, 2, 1, 0, 2, 2, 2, 1])


def test_scores_of_each_label_are_those_worked_out_by_hand() -> None:
    confusion = confusion_matrix(TRUTH, PREDICTED, 3)
    assert confusion.tolist() == [[2, 1, 1], [1, 1, 0], [0, 1, 3]]
    precision, recall, f1, support = scores(confusion)
    assert precision.tolist() == pytest.approx([2 / 3, 1 / 3, 3 / 4])
    assert recall.tolist() == pytest.approx([2 / 4, 1 / 2, 3 / 4])
    assert f1.tolist() == pytest.approx([4 / 7, 2 / 5, 3 / 4])
    assert support.tolist() == [4, 2, 4]


def test_averages_are_those_worked_out_by_hand() -> None:
    found = averages(confusion_matrix(TRUTH, PREDICTED, 3))
    macro = {"precision": 2 / 3 + 1 / 3 + 3 / 4, "recall": 1 / 2 + 1 / 2 + 3 / 4, "f1": 4 / 7 + 2 / 5 + 3 / 4}
    assert found["macro"] == pytest.approx({name: total / 3 for name, total in macro.items()})
    assert found["micro"] == pytest.approx({"precision": 0.6, "recall": 0.6, "f1": 0.6})
    assert found["weighted"] == pytest.approx(
        {"precision": (4 * 2 / 3 + 2 / 3 + 3) / 10, "recall": 0.6, "f1": (4 * 4 / 7 + 2 * 2 / 5 + 3) / 10}
    )


def test_a_label_that_never_occurs_is_zero_and_counts_in_no_average() -> None:
    found = averages(confusion_matrix(TRUTH, PREDICTED, 3))
    wider = confusion_matrix(TRUTH, PREDICTED, 4)
    assert [values[3] for values in scores(wider)] == [0, 0, 0, 0]
    assert averages(wider) == found
    only_predicted = averages(confusion_matrix(np.array([0, 0]), np.array([0, 1]), 2))
    assert only_predicted["macro"] == pytest.approx({"precision": 0.5, "recall": 0.25, "f1": (2 / 3) / 2})


def test_the_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    # Two texts at 0.9 of which one is right, two at 0.6 of which both are: (2 * |0.9 - 0.5| + 2 * |0.6 - 1|) / 4
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    assert expected_calibration_error(probabilities, np.array([0, 1, 0, 1])) == pytest.approx(0.4)
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0.0


def test_the_temperature_makes_the_likelihood_the_largest() -> None:
    # Three of four right at a logit gap of 4: the best gap is ln 3, so the temperature is 4 / ln 3.
    logits = np.array([[4.0, 0.0]] * 4)
    truth = np.array([0, 0, 0, 1])
    assert fit_temperature(logits, truth) == pytest.approx(4 / np.log(3), rel=1e-6)
    draws = np.random.default_rng(0).normal(size=(500, 5))
    targets = np.array([np.random.default_rng(i).choice(5, p=softmax(row)) for i, row in enumerate(draws)])
    found = fit_temperature(draws * 3, targets)
    assert found == pytest.approx(3, rel=0.1), "logits three times too sharp"

    def likelihood(temperature: float) -> float:
        return float(np.log(softmax(draws * 3 / temperature)[np.arange(500), targets]).mean())

    assert likelihood(found) > max(likelihood(found * 1.01), likelihood(found * 0.99))


def test_the_temperature_is_bounded_where_the_likelihood_has_no_peak() -> None:
    logits = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, np.array([0, 1])) == pytest.approx(MIN_TEMPERATURE)
    assert fit_temperature(logits, np.array([1, 0])) == pytest.approx(MAX_TEMPERATURE)


def test_the_report_says_it_all_and_the_summary_names_the_weakest_label() -> None:
    logits = np.eye(3)[PREDICTED] * 2.0
    found = report(logits, TRUTH, ("card", "cash", "loan"))
    assert (found["num_examples"], found["accuracy"]) == (10, 0.6)
    assert found["per_label"][1] == pytest.approx(
        {"label": "cash", "precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5, "support": 2}
    )
    assert found["confusion_matrix"]["counts"][0] == [2, 1, 1]
    before, after = found["calibration"]["before"], found["calibration"]["after"]
    confidence = np.exp(2) / (np.exp(2) + 2)
    assert before["expected_calibration_error"] == pytest.approx(confidence - 0.6)
    assert after["expected_calibration_error"] == pytest.approx(0, abs=1e-6), "one confidence, so it can be met"
    assert after["negative_log_likelihood"] < before["negative_log_likelihood"]
    text = summary(found)
    assert text.startswith("Validation: accuracy 0.600, macro-F1 0.574; weakest: cash (F1 0.40, 2 rows)")
    assert "at the temperature" in text


def test_a_perfect_classifier_has_no_weakest_label() -> None:
    found = report(np.eye(2) * 5, np.array([0, 1]), ("ham", "spam"))
    assert "weakest" not in summary(found)
