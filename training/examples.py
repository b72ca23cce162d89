"""The examples of a run: records of the stored files, rendered, and kept as memory-mapped Arrow files.

Plan and loop both call `load_examples`, so what was counted is what is trained. Does not resolve settings.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from training.model_shape import ModelShape
from training.records import Record, RecordError, iter_records
from training.render import Example, Renderer, RenderError
from training.spec import AUTO, TrainSpec
from training.storage import Storage

if TYPE_CHECKING:
    from datasets import Dataset

MAX_PROBLEMS = 50
_ROWS_PER_BATCH = 1000
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.bool_()))])


class ExamplesError(ValueError):
    """Records that cannot be trained on, by line (the first 50); `param` names the file."""

    def __init__(self, param: str, problems: list[tuple[int, str]]) -> None:
        super().__init__("; ".join(f"line {line}: {text}" for line, text in problems))
        self.param = param
        self.problems = problems


def load_examples(spec: TrainSpec, storage: Storage, cache_dir: Path | None = None) -> tuple[Dataset, Dataset | None]:
    """Training and validation examples with columns `input_ids` and `trained`, in the order of the file.

    The Arrow files are written to `cache_dir`, or a new temporary folder; give each process its own. Without a
    validation file, `validation_split` of the records is held out, chosen by `seed` alone. ExamplesError if any record
    cannot be rendered or is longer than allowed.
    """
    folder = Path(cache_dir) if cache_dir is not None else Path(tempfile.mkdtemp(prefix="examples-"))
    base = storage.local_folder(spec.base.key)
    renderer, limit = Renderer.load(base), spec.hyperparameters.max_length
    max_length = ModelShape(base).max_context if limit == AUTO else limit
    train = _write(renderer, storage, spec.training_key, "training_file", max_length, folder / "train.arrow")
    if spec.validation_key is not None:
        key, path = spec.validation_key, folder / "validation.arrow"
        return train, _write(renderer, storage, key, "validation_file", max_length, path)
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


def _write(renderer: Renderer, storage: Storage, key: str, param: str, max_length: int, path: Path) -> Dataset:
    from datasets import Dataset  # takes a second to import: only where examples are really loaded

    problems: list[tuple[int, str]] = []
    rows: list[Example] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for line, outcome in _rendered(renderer, storage, key):
            if isinstance(outcome, Example):
                outcome = _fitting(outcome, max_length)
            if isinstance(outcome, str):
                problems.append((line, outcome))
                if len(problems) == MAX_PROBLEMS:
                    break
                continue
            rows.append(outcome)
            if len(rows) == _ROWS_PER_BATCH:
                writer.write_batch(_batch(rows))
                rows = []
        if rows:
            writer.write_batch(_batch(rows))
    if problems:
        raise ExamplesError(param, problems)
    return Dataset.from_file(str(path))


def _fitting(example: Example, max_length: int) -> Example | str:
    num_tokens = len(example.token_ids)
    if num_tokens <= max_length:
        return example
    return f"{num_tokens} tokens, and at most {max_length} are allowed; shorten or split the record"


def _batch(rows: list[Example]) -> pa.RecordBatch:
    columns = [[row.token_ids for row in rows], [row.trained for row in rows]]
    return pa.record_batch([pa.array(c, type=f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)


def _rendered(renderer: Renderer, storage: Storage, key: str) -> Iterator[tuple[int, Example | str]]:
    """Each line's example, or what is wrong with it."""
    lines: list[int] = []
    faults: list[tuple[int, str]] = []

    def good(file_records: Iterator[tuple[int, Record | RecordError]]) -> Iterator[Record]:
        for number, record in file_records:
            if isinstance(record, RecordError):
                faults.append((number, record.message))
            else:
                lines.append(number)
                yield record

    with storage.open_read(key) as file:
        for position, outcome in enumerate(renderer.encode_examples(good(iter_records(file)))):
            while faults and faults[0][0] < lines[position]:
                yield faults.pop(0)
            yield lines[position], outcome.message if isinstance(outcome, RenderError) else outcome
    yield from faults
