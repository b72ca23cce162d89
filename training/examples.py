"""The examples of a run: records of the stored files, rendered, and kept as memory-mapped Arrow files.

Plan and loop both call `load_examples`, so what was counted is what is trained. Does not resolve settings.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from training.model_shape import ModelShape
from training.records import (
    ClassificationRecord,
    Record,
    RecordError,
    RecordKind,
    Sequence,
    TextRecord,
    iter_records,
    kind_of,
    sequences_of,
)
from training.render import Example, Renderer, RenderError
from training.spec import AUTO, TrainSpec
from training.storage import Storage
from training.strict_json import show

if TYPE_CHECKING:
    from datasets import Dataset

MAX_PROBLEMS = 50
_ROWS_PER_BATCH = 1000
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("lengths", pa.list_(pa.int32())),
        ("piece", pa.int32()),
    ]
)
_LABELLED_SCHEMA = _SCHEMA.append(pa.field("label", pa.int32()))
# What each method learns from.
KINDS: dict[str, tuple[RecordKind, ...]] = {
    "supervised": ("chat", "completion", "text"),
    "dpo": ("preference",),
    "classification": ("classification",),
    "embedding": ("pair",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """What a model learns from one record."""

    sequences: tuple[Example, ...]
    label: int | None = None  # number of its label, with the method classification
    is_text: bool = False  # plain text, which may be cut anywhere
    piece: int = 0  # its number among the pieces of a text that was cut


Outcome = Row | str  # or what is wrong with the record


class ExamplesError(ValueError):
    """Records that cannot be trained on, by line (the first 50); `param` names the file."""

    def __init__(self, param: str, problems: list[tuple[int, str]]) -> None:
        super().__init__("; ".join(f"line {line}: {text}" for line, text in problems))
        self.param = param
        self.problems = problems


def load_examples(spec: TrainSpec, storage: Storage, cache_dir: Path | None = None) -> tuple[Dataset, Dataset | None]:
    """Training and validation examples with columns `input_ids`, `trained` and `lengths`, in the order of the file.

    An example is what its record makes a model read: one sequence, or one after the other the two of a preference, the
    better one first, or the texts of a pair; `lengths` holds the tokens of each. A plain text longer than allowed
    becomes several examples, which a column `piece` numbers from 0. With the method classification, whose labels must
    be resolved, a column `label` holds the number of each example's label. The Arrow files are written to `cache_dir`,
    or a new temporary folder; give each process its own. Without a validation file, `validation_split` of the examples
    is held out, chosen by `seed` alone. ExamplesError if any record cannot be rendered, is longer than allowed, is of a
    kind that the method does not learn from, or has a label that the training file lacks.
    """
    folder = Path(cache_dir) if cache_dir is not None else Path(tempfile.mkdtemp(prefix="examples-"))
    base = storage.local_folder(spec.base.key)
    renderer, limit = Renderer.load(base), spec.hyperparameters.max_length
    max_length = ModelShape(base).longest(spec.method) if limit == AUTO else limit
    write = partial(_write, renderer, storage, spec, max_length)
    train = write(spec.training_key, "training_file", folder / "train.arrow")
    if spec.validation_key is not None:
        return train, write(spec.validation_key, "validation_file", folder / "validation.arrow")
    held_out = split(len(train), spec.validation_split, spec.seed)
    if not held_out:
        return train, None
    kept = sorted(set(range(len(train))) - set(held_out))
    return train.select(kept), train.select(held_out)


def split(num_examples: int, share: float, seed: int) -> list[int]:
    """Indices held out for validation, ascending: at least one if a share is asked for, and one is always left."""
    if share <= 0 or num_examples < 2:
        return []
    num_held_out = min(max(1, round(num_examples * share)), num_examples - 1)
    return sorted(random.Random(seed).sample(range(num_examples), num_held_out))


def _write(
    renderer: Renderer, storage: Storage, spec: TrainSpec, max_length: int, key: str, param: str, path: Path
) -> Dataset:
    from datasets import Dataset  # takes a second to import: only where examples are really loaded

    problems: list[tuple[int, str]] = []
    rows: list[Row] = []
    schema = _SCHEMA if spec.classification is None else _LABELLED_SCHEMA
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for line, outcome in _rendered(renderer, storage, key, spec):
            if not isinstance(outcome, str) and not outcome.is_text:
                outcome = _fitting(outcome, max_length, spec.method)
            if isinstance(outcome, str):
                problems.append((line, outcome))
                if len(problems) == MAX_PROBLEMS:
                    break
                continue
            rows += _pieces(outcome, max_length) if outcome.is_text else [outcome]
            if len(rows) >= _ROWS_PER_BATCH:
                writer.write_batch(_batch(rows, schema))
                rows = []
        if rows:
            writer.write_batch(_batch(rows, schema))
    if problems:
        raise ExamplesError(param, problems)
    return Dataset.from_file(str(path))


def _fitting(row: Row, max_length: int, method: str) -> Outcome:
    sequences = row.sequences
    num_tokens = max(len(sequence.token_ids) for sequence in sequences)
    if num_tokens > max_length:
        return f"{num_tokens} tokens, and at most {max_length} are allowed; shorten or split the record"
    if len({sequence.token_ids for sequence in sequences}) < len(sequences):
        if method == "embedding":
            return "two of its texts are the same to the base's tokenizer, nothing to learn"
        return "the chat template writes both outputs alike, nothing to prefer"
    return row


def _pieces(row: Row, max_length: int) -> list[Row]:
    """A text in pieces of at most so many tokens. The first token of each has nothing before it to predict it from."""
    (whole,) = row.sequences
    starts = list(range(0, len(whole.token_ids), max_length))
    if len(starts) > 1 and len(whole.token_ids) - starts[-1] == 1:
        starts[-1] -= 1  # a token alone, often the end of the text, would not be learned
    pieces: list[Row] = []
    for start, end in pairwise([*starts, len(whole.token_ids)]):
        ids, trained = whole.token_ids[start:end], whole.trained[start:end]
        if any(trained[1:]):
            pieces.append(Row((Example(ids, (False, *trained[1:])),), piece=len(pieces)))
    return pieces


def _batch(rows: list[Row], schema: pa.Schema) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {
        "input_ids": [list(chain.from_iterable(sequence.token_ids for sequence in row.sequences)) for row in rows],
        "trained": [list(chain.from_iterable(sequence.trained for sequence in row.sequences)) for row in rows],
        "lengths": [[len(sequence.token_ids) for sequence in row.sequences] for row in rows],
        "label": [row.label for row in rows],
        "piece": [row.piece for row in rows],
    }
    return pa.record_batch([pa.array(columns[field.name], type=field.type) for field in schema], schema=schema)


def _rendered(renderer: Renderer, storage: Storage, key: str, spec: TrainSpec) -> Iterator[tuple[int, Outcome]]:
    """Each line's sequences, or what is wrong with it. A file holds one kind, so a wrong one is told once."""
    labels = {label: number for number, label in enumerate(spec.labels())}
    lines: list[tuple[int, int, int | None, bool]] = []  # of good ones: number, sequences, label, whether plain text
    faults: list[tuple[int, str]] = []

    def good(file_records: Iterator[tuple[int, Record | RecordError]]) -> Iterator[Sequence]:
        for number, record in file_records:
            if isinstance(record, RecordError):
                faults.append((number, record.message))
            elif kind_of(record) not in KINDS[spec.method]:
                faults.append((number, _wrong_kind(record, spec.method)))
                return
            elif isinstance(record, ClassificationRecord) and record.label not in labels:
                faults.append((number, f"no record of the training file has the label {show(record.label)}"))
            else:
                sequences = sequences_of(record)
                label = labels[record.label] if isinstance(record, ClassificationRecord) else None
                lines.append((number, len(sequences), label, isinstance(record, TextRecord)))
                yield from sequences

    with storage.open_read(key) as file:
        outcomes = renderer.encode_examples(good(iter_records(file)))
        for position, first in enumerate(outcomes):
            number, num_sequences, label, is_text = lines[position]
            while faults and faults[0][0] < number:
                yield faults.pop(0)
            yield number, _together([first, *islice(outcomes, num_sequences - 1)], label, is_text=is_text)
    yield from faults


def _wrong_kind(record: Record, method: str) -> str:
    kind = kind_of(record)
    fitting = next(name for name, kinds in KINDS.items() if kind in kinds)
    wanted = " or ".join(KINDS[method])
    return f"a {kind} record, and the method {method} learns from {wanted} records; {kind} records need {fitting}"


def _together(outcomes: list[Example | RenderError], label: int | None, *, is_text: bool) -> Outcome:
    for outcome in outcomes:
        if isinstance(outcome, RenderError):
            return outcome.message
    return Row(tuple(outcome for outcome in outcomes if isinstance(outcome, Example)), label, is_text)
