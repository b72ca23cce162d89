"""The engine of encoders: classifiers and embedding models, whose answer is one row of numbers for each text.

Requests are split into sequences, and sequences of all requests are batched anew at every step: the oldest that waits,
and those nearest to it in length, up to so many tokens. So padding is little, and nobody waits for ever. The queue is
the asyncio loop's alone; only the model runs in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from service.engine.admission import EngineFailed, Places, UnfitRequest
from service.engine.protocol import EngineStats

if TYPE_CHECKING:
    import numpy as np

    from service.engine.native.encoder_runner import EncoderRunner

EncoderTask = Literal["classify", "embed"]


class UnfitSequence(UnfitRequest):
    """A sequence that the model cannot read; `index` is its place in the request."""

    def __init__(self, index: int, message: str, *, is_too_long: bool = False) -> None:
        super().__init__(message)
        self.index, self.is_too_long = index, is_too_long


@dataclass(eq=False)
class Waiting:
    """A sequence that waits for its row; `row` is done, or cancelled when nobody reads it any more."""

    token_ids: tuple[int, ...]
    row: asyncio.Future[np.ndarray]


class EncoderEngine:
    """One classifier or embedding model. `labels` is empty for the latter; both are known once it has started."""

    def __init__(
        self,
        folder: Path,
        *,
        task: EncoderTask,
        adapter: Path | None = None,
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        max_requests: int = 256,
        num_threads: int | None = None,
    ) -> None:
        """`adapter` is a LoRA folder that is merged into the weights; `num_threads` is torch's, for this process."""
        self.max_context = 0  # tokens of one sequence
        self.labels: tuple[str, ...] = ()
        self._folder, self._task, self._adapter, self._dtype = folder, task, adapter, dtype
        self._num_threads = num_threads
        self._places = Places(0, max_requests)
        self._waiting: list[Waiting] = []
        self._running: list[Waiting] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._work: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    @property
    def healthy(self) -> bool:
        """Whether it can answer: started, not stopped, not broken."""
        return self._work is not None and self._failure is None

    async def start(self) -> None:
        """Load the weights; returns when ready."""
        assert self._work is None, "an engine starts once"
        runner = await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        self.max_context, self.labels, self._vocab_size = runner.max_context, runner.labels, runner.vocab_size
        self._work = asyncio.create_task(self._run(runner))

    def _load(self) -> EncoderRunner:
        """Imports torch here, so that importing this module costs nothing."""
        from service.engine.native.encoder_runner import EncoderRunner

        return EncoderRunner(
            self._folder, task=self._task, adapter=self._adapter, dtype=self._dtype, num_threads=self._num_threads
        )

    async def encode(self, sequences: Sequence[tuple[int, ...]]) -> np.ndarray:
        """float32 [sequences, labels or width]: log-probabilities of the labels, or embeddings.

        UnfitSequence for one that the model cannot read, QueueFull when too many requests wait, EngineFailed when the
        engine stopped. Cancelling frees what has not been run yet."""
        import numpy as np

        self._check_running()
        for index, token_ids in enumerate(sequences):
            self._check(index, token_ids)
        self._places.take(1)
        loop = asyncio.get_running_loop()
        asked = [Waiting(token_ids, loop.create_future()) for token_ids in sequences]
        self._waiting += asked
        self._arrived.set()
        try:
            return np.stack([await item.row for item in asked])
        finally:
            for item in asked:
                item.row.cancel()
            self._places.give_back(1)

    def _check(self, index: int, token_ids: tuple[int, ...]) -> None:
        if not token_ids:
            raise UnfitSequence(index, "it has no tokens")
        if len(token_ids) > self.max_context:
            message = f"it has {len(token_ids)} tokens; this model reads at most {self.max_context}"
            raise UnfitSequence(index, message, is_too_long=True)
        if not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            raise UnfitSequence(index, f"a token id is outside this model's vocabulary of {self._vocab_size}")

    def stats(self) -> EngineStats:
        """Current counts, of sequences."""
        num_waiting = sum(not item.row.done() for item in self._waiting)
        return EngineStats(num_running=len(self._running), num_waiting=num_waiting, num_generated_tokens=0)

    async def stop(self) -> None:
        """End all requests with EngineFailed, and free the weights."""
        if self._work is not None and not self._work.done():
            self._work.cancel()
            await asyncio.wait({self._work})
        self._fail(self._failure or EngineFailed("the engine was stopped"))
        await asyncio.to_thread(self._thread.shutdown)

    def _check_running(self) -> None:
        if self._failure is not None:
            raise EngineFailed("the engine has failed or was stopped") from self._failure
        if self._work is None:
            raise EngineFailed("the engine has not been started")

    async def _run(self, runner: EncoderRunner) -> None:
        """Batch after batch, for ever; what the model raises ends the engine and every request."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._arrived.wait()
                self._take(runner.batch_tokens)
                if self._running:
                    sequences = [item.token_ids for item in self._running]
                    rows = await loop.run_in_executor(self._thread, runner, sequences)
                    for item, row in zip(self._running, rows, strict=True):
                        if not item.row.done():
                            item.row.set_result(row)
                    self._running = []
        except Exception as error:  # a task edge: out of memory or our own mistake; nobody may be left waiting
            self._fail(error)

    def _take(self, max_tokens: int) -> None:
        """Move the next batch from waiting to running."""
        self._waiting = [item for item in self._waiting if not item.row.done()]
        self._running = next_batch(self._waiting, max_tokens)
        chosen = set(map(id, self._running))
        self._waiting = [item for item in self._waiting if id(item) not in chosen]
        if not self._waiting:
            self._arrived.clear()

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        for item in (*self._running, *self._waiting):
            if not item.row.done():
                failed = EngineFailed(f"the engine failed: {error}")
                failed.__cause__ = error
                item.row.set_exception(failed)
                item.row.exception()  # marks it as seen: its request may have ended with the first of its rows
        self._running, self._waiting = [], []


def next_batch(waiting: list[Waiting], max_tokens: int) -> list[Waiting]:
    """The oldest and those nearest to it in length, as many as fit `max_tokens` with padding; at least the oldest."""
    if not waiting:
        return []
    oldest, longest = len(waiting[0].token_ids), 0
    batch: list[Waiting] = []
    for item in sorted(waiting, key=lambda item: abs(len(item.token_ids) - oldest)):
        longest = max(longest, len(item.token_ids))
        if batch and longest * (len(batch) + 1) > max_tokens:
            break
        batch.append(item)
    return batch
