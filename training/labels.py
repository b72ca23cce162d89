"""The labels of a classification job: which there are, whether they can be learned, and what its owner should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import cast

from training.records import ClassificationRecord, iter_records
from training.spec import TrainSpec
from training.storage import Storage
from training.strict_json import show

MAX_LABELS = 1000
_NUM_NAMED = 5


def count_labels(storage: Storage, key: str) -> dict[str, int]:
    """How many records of a file have each label, in the order of the labels' numbers. What is no classification record
    is left out: `training.examples` refuses it by its line."""
    with storage.open_read(key) as file:
        counts = Counter(found.label for _, found in iter_records(file) if isinstance(found, ClassificationRecord))
    return dict(sorted(counts.items()))


def problem_of(counts: dict[str, int]) -> str | None:
    """Why nothing can be learned from a file with these labels; None if it can."""
    if len(counts) == 1:
        return f"every record has the label {show(next(iter(counts)))}; a classifier needs two labels or more"
    if len(counts) > MAX_LABELS:
        return f"{len(counts)} different labels, and at most {MAX_LABELS} are allowed; a label names a class of texts"
    return None


def with_counts(spec: TrainSpec, trained: Iterable[int]) -> TrainSpec:
    """The spec with the number of training examples of each label, from the labels of all of them."""
    assert spec.classification is not None
    counts = Counter(trained)
    numbers = tuple(counts[number] for number in range(len(spec.labels())))
    found = spec.classification.model_copy(update={"label_counts": numbers})
    return spec.model_copy(update={"classification": found})


def warnings_of(spec: TrainSpec) -> list[str]:
    """What is legal but makes a poor classifier. The spec has its labels and how often each is trained."""
    assert spec.classification is not None
    counts = dict(zip(spec.labels(), cast(tuple[int, ...], spec.classification.label_counts), strict=True))
    warnings = []
    if not spec.validates():
        warnings.append(
            "There are no validation rows, so the job ends without accuracy, precision and recall, and its "
            "probabilities are not calibrated: add a validation file or a validation_split."
        )
    if unseen := [label for label, count in counts.items() if count == 0]:
        texts = "All texts of these labels were held out for validation, so the model cannot learn them"
        warnings.append(f"{texts}: {_listed(unseen)}.")
    if rare := [label for label, count in counts.items() if count == 1]:
        warnings.append(f"These labels have one training text only: {_listed(rare)}.")
    return warnings


def _listed(labels: list[str]) -> str:
    named = ", ".join(show(label) for label in labels[:_NUM_NAMED])
    return named + (f" and {len(labels) - _NUM_NAMED} more" if len(labels) > _NUM_NAMED else "")
