"""TensorBoard, for every job, by `TUNESMITH_TENSORBOARD_DIR`: one folder of event files per job.

Each attempt adds a file that takes back what earlier ones hold (a purge from step 0) and has the whole curve in it:
what a killed writer left in its buffers is not missing, and no step is there twice. Written by TensorBoard's own
writer, which needs neither TensorFlow nor torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.store.tables import Job, Metric
from service.trackers.tracker import numbers, outcome_of, settings_of


class TensorboardTracker:
    """One job's event file of this attempt."""

    key, name = "tensorboard", "TensorBoard"

    def __init__(self, folder: Path) -> None:
        """`folder` is what `tensorboard --logdir` gets; the job's is below it."""
        self._folder = folder.expanduser().resolve()
        self._writer: Any = None

    def open(self, job: Job) -> None:
        """A new event file."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(self._folder / job.id))
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(step=0, wall_time=time.time(), session_log=start))
        chosen = {name: _plain(value) for name, value in settings_of(job).items()}
        self._add(0, time.time(), hparams_pb(chosen, trial_id=job.id))

    def log(self, rows: Sequence[Metric]) -> None:
        """One scalar per number, in the file when this returns."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for row in rows:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(row).items()]
            self._add(row.step, row.at, Summary(value=values))
        self._writer.flush()

    def close(self, job: Job) -> None:
        """The outcome as text."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        for name, text in outcome_of(job).items():
            self._add(0, time.time(), text_pb(name, text))
        self._writer.close()

    def _add(self, step: int, at: float, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(step=step, wall_time=at, summary=summary))


def _plain(value: Any) -> bool | int | float | str:
    """TensorBoard's hyperparameters are these; anything else as text."""
    return value if isinstance(value, bool | int | float | str) else str(value)
