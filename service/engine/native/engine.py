"""The native engine: the protocol on the asyncio side, and the thread that steps the model.

Requests enter the thread by a queue; what a step produced leaves it in one call into the asyncio loop. The thread is
the only one that touches the model; the asyncio side alone counts places and adapters in use.
"""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from service.engine.admission import EngineFailed, Places, check_request
from service.engine.protocol import AdapterRef, Delta, EngineStats, GenerateRequest
from service.engine.token_text import TokenDecoder

if TYPE_CHECKING:
    from service.engine.detokenizer import Echo
    from service.engine.native.adapters import LoadedAdapter
    from service.engine.native.logprobs import PromptScores
    from service.engine.native.residency import Residency
    from service.engine.native.stepper import Stepper


@dataclass(eq=False)
class Stream:
    """One request on its way: what the thread needs of it, and where its deltas go."""

    request: GenerateRequest
    adapter: LoadedAdapter | None
    scores: PromptScores | None = None  # of the prompt, where they are asked for, while it is read
    echo: Echo | None = None  # once the prompt has been read
    inbox: asyncio.Queue[list[Delta] | EngineFailed] = field(default_factory=asyncio.Queue)


@dataclass(frozen=True)
class _Submit:
    stream: Stream


@dataclass(frozen=True)
class _Cancel:
    stream: Stream


class _Stop:
    pass


class NativeEngine:
    """Continuous batching for any causal language model that transformers loads."""

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer: TokenDecoder,
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        max_batch_size: int = 32,
        max_waiting: int = 256,
        max_resident_adapters: int = 16,
        num_threads: int | None = None,
        stop_token_ids: tuple[int, ...] = (),
        max_context: int | None = None,
        max_cache_tokens: int | None = None,
    ) -> None:
        """`max_context` lowers the model's own limit; `num_threads` is torch's, for this process; `max_cache_tokens`
        bounds the cache of keys and values, which otherwise takes its share of the memory that is free."""
        self._max_cache_tokens = max_cache_tokens
        self.max_context = max_context or 0
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._max_batch_size = max_batch_size
        self._max_resident_adapters = max_resident_adapters
        self._num_threads = num_threads
        self._stop_token_ids = frozenset(stop_token_ids)
        self._places = Places(max_batch_size, max_waiting)
        self._commands: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._streams: set[Stream] = set()
        self._thread: threading.Thread | None = None
        self._stepper: Stepper | None = None
        self._adapters: Residency[LoadedAdapter] | None = None
        self._failure: BaseException | None = None

    @property
    def healthy(self) -> bool:
        """Whether it can answer: started, not stopped, not broken."""
        return self._stepper is not None and self._failure is None

    async def start(self) -> None:
        """Load the weights in the engine's thread; its errors are raised here."""
        assert self._thread is None, "an engine starts once"
        self._loop = asyncio.get_running_loop()
        ready: asyncio.Future[Stepper] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        stepper = await ready
        from service.engine.native.adapters import load_adapter
        from service.engine.native.residency import Residency

        layers = stepper.runner.layers
        self._adapters = Residency(self._max_resident_adapters, lambda ref: load_adapter(ref, layers))
        self.max_context = stepper.max_context
        self._stepper = stepper

    async def load_adapter(self, adapter: AdapterRef) -> None:
        """Make an adapter resident. AdapterMismatch if it cannot run here."""
        self._check_running()
        assert self._adapters is not None
        await self._adapters.acquire(adapter)
        self._adapters.release(adapter)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Delta]]:
        """Stream the deltas of a request; closing the iterator ends its sequences within one step."""
        self._check_running()
        assert self._stepper is not None
        assert self._adapters is not None
        check_request(request, max_context=self.max_context, vocab_size=self._stepper.runner.vocab_size)
        self._places.take(request.n)
        adapter = None
        try:
            if request.adapter is not None:
                adapter = await self._adapters.acquire(request.adapter)
            async with aclosing(self._stream(Stream(request, adapter))) as steps:
                async for deltas in steps:
                    yield deltas
        finally:
            if request.adapter is not None and adapter is not None:
                self._adapters.release(request.adapter)
            self._places.give_back(request.n)

    async def _stream(self, stream: Stream) -> AsyncGenerator[list[Delta]]:
        """Hand a stream to the thread and pass on what comes back."""
        self._check_running()
        self._streams.add(stream)
        self._commands.put(_Submit(stream))
        num_open = stream.request.n
        try:
            while num_open:
                deltas = await stream.inbox.get()
                if isinstance(deltas, EngineFailed):
                    raise deltas
                num_open -= sum(delta.finish_reason is not None for delta in deltas)
                yield deltas
        finally:
            self._streams.discard(stream)
            if num_open:
                self._commands.put(_Cancel(stream))

    def stats(self) -> EngineStats:
        """Current counts, as of the last step."""
        stepper, adapters = self._stepper, self._adapters
        num_running = stepper.num_running if stepper and self.healthy else 0
        return EngineStats(
            num_running=num_running,
            num_waiting=max(0, self._places.num_held - num_running),
            num_generated_tokens=stepper.num_generated_tokens if stepper else 0,
            resident_adapters=adapters.resident if adapters else (),
            num_adapter_loads=adapters.num_loads if adapters else 0,
            adapter_load_s=tuple(adapters.load_s) if adapters else (),
            num_preempted=stepper.num_preempted if stepper else 0,
        )

    async def stop(self) -> None:
        """End all streams with EngineFailed, and free the weights."""
        if self._thread is None:
            return
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.join)
        self._fail(self._failure or EngineFailed("the engine was stopped"))
        self._stepper = None
        gc.unfreeze()
        if self._adapters is not None:
            self._adapters.clear()

    def _check_running(self) -> None:
        if self._failure is not None:
            raise EngineFailed("the engine has failed or was stopped") from self._failure
        if self._stepper is None:
            raise EngineFailed("the engine has not been started")

    def _fail(self, error: BaseException) -> None:
        """Asyncio side: the thread is gone; every open stream gets to know why."""
        self._failure = error
        for stream in self._streams:
            failed = EngineFailed(f"the engine failed: {error}")
            failed.__cause__ = error
            stream.inbox.put_nowait(failed)
        self._streams.clear()

    def _deliver(self, step: list[tuple[Stream, list[Delta]]]) -> None:
        for stream, deltas in step:
            stream.inbox.put_nowait(deltas)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        """From the thread into the asyncio loop."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop has ended, and with it every reader
            self._commands.put(_Stop())

    def _run(self, ready: asyncio.Future[Stepper]) -> None:
        """The thread: load, then step until stopped."""
        try:
            stepper = self._load()
        except BaseException as error:  # process edge: whoever starts the engine gets it
            self._failure = error
            self._call(ready.set_exception, error)
            return
        self._call(ready.set_result, stepper)
        try:
            while self._obey(stepper):
                if step := stepper.step():
                    self._call(self._deliver, step)
        except BaseException as error:  # process edge: out of memory or our own mistake; nobody may be left waiting
            self._call(self._fail, error)

    def _load(self) -> Stepper:
        """Imports torch here, so that importing this module costs nothing."""
        import torch
        from transformers.utils.logging import disable_progress_bar

        from service.engine.allocator import keep_freed_memory
        from service.engine.native.runner import load_runner
        from service.engine.native.stepper import Stepper

        disable_progress_bar()
        keep_freed_memory()
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        with torch.inference_mode():
            runner = load_runner(
                self._folder,
                self._dtype,
                max_rows=self._max_batch_size,
                with_adapters=self._max_resident_adapters > 0,
                max_cache_tokens=self._max_cache_tokens,
            )
        gc.freeze()  # what was loaded stays: looking through it for garbage would take a tenth of the time
        return Stepper(
            runner,
            self._tokenizer,
            max_batch_size=self._max_batch_size,
            stop_token_ids=self._stop_token_ids,
            max_context=self.max_context or None,
        )

    def _obey(self, stepper: Stepper) -> bool:
        """Carry out what was asked since the last step, waiting while there is nothing to do. False to stop."""
        while stepper.is_idle or not self._commands.empty():
            command = self._commands.get()
            match command:
                case _Submit(stream):
                    stepper.submit(stream)
                case _Cancel(stream):
                    stepper.cancel(stream)
                case _Stop():
                    return False
        return True
