"""Progress out, wishes in: a side thread of rank 0, so that no step ever waits for the owner of the run."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any, Self

from training.progress import (
    ArtifactWritten,
    Channel,
    CheckpointSaved,
    Failed,
    Item,
    ProgressItem,
    StepMetrics,
    Stopped,
    Wish,
)

_AT_ONCE = (CheckpointSaved, ArtifactWritten, Stopped, Failed)


class OwnerLost(Exception):
    """Nobody takes this run's progress any more; it must not train on without an owner."""


class Reporter:
    """Batches items, sends them in order, keeps the latest wish. Without a channel (other ranks) it stays silent."""

    def __init__(self, channel: Channel | None, interval_s: float = 0.2, patience_s: float = 30.0) -> None:
        self._channel, self._interval_s, self._patience_s = channel, interval_s, patience_s
        self._queue: list[ProgressItem] = []
        self._num_said = 0
        self._had_step = False
        self._wish = Wish.GO_ON
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._closing = False
        self._lost: Exception | None = None
        self._thread = threading.Thread(target=self._send_all, name="reporter", daemon=True)

    @property
    def wish(self) -> Wish:
        """What the owner wanted last; OwnerLost when there is none any more."""
        if self._lost is not None:
            raise OwnerLost("the owner of this run cannot be reached") from self._lost
        return self._wish

    def say(self, kind: type[Item], **fields: Any) -> None:
        """Queue one item. Rare and important ones are sent at once."""
        if self._channel is None:
            return
        with self._lock:
            item: Any = kind(seq=self._num_said, at=time.time(), **fields)
            self._num_said += 1
            self._queue.append(item)
        if isinstance(item, _AT_ONCE) or (isinstance(item, StepMetrics) and not self._had_step):
            self._wake.set()
        self._had_step |= isinstance(item, StepMetrics)

    def __enter__(self) -> Self:
        if self._channel is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._channel is None:
            return
        if error is not None:
            self._patience_s = 0.0  # the run is crashing: what cannot be said at once stays unsaid
        self._closing = True
        self._wake.set()
        self._thread.join()
        if error is None and self._lost is not None:
            raise OwnerLost("the owner of this run cannot be reached") from self._lost

    def _send_all(self) -> None:
        """Send until closed and empty; an empty send asks for the wish and shows that the run lives."""
        assert self._channel is not None
        failing_since: float | None = None
        while True:
            if self._wake.wait(0.0 if failing_since is None and self._closing else self._interval_s):
                self._wake.clear()
            with self._lock:
                items = list(self._queue)
            closing = self._closing
            try:
                self._wish = self._channel.send(items)
            except Exception as error:  # process edge: any fault of the way to the owner is retried, order is kept
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since >= self._patience_s:
                    self._lost = error
                    return
                continue
            failing_since = None
            with self._lock:
                del self._queue[: len(items)]
                if closing and not self._queue:
                    return
