"""An engine without a model: answers with the prompt's own tokens. For tests, demos and load tests of everything else.

It ships, and passes the same conformance tests as the native engine.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from service.engine.admission import EngineFailed, Places, check_request
from service.engine.detokenizer import ChoiceText, echo_of
from service.engine.protocol import AdapterMismatch, AdapterRef, Delta, EngineStats, GenerateRequest
from service.engine.token_text import Score, TokenDecoder, TokenPieces


class ByteTokenizer:
    """Token i is byte i: enough of a tokenizer where no model's own is at hand."""

    def encode(self, text: str) -> tuple[int, ...]:
        """The UTF-8 bytes."""
        return tuple(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of the bytes; ids beyond 255 wrap round, so that any prompt can be echoed."""
        return bytes(token_id & 0xFF for token_id in ids).decode(errors="replace")

    def id_to_token(self, id: int) -> str:
        """A byte as vocabularies write it."""
        return f"<0x{id & 0xFF:02X}>"


class EchoEngine:
    """Echoes the prompt, one token every `token_interval_s`; an adapter's answer begins with "[adapter id] ".

    It answers as a model that puts all its probability on the prompt's next token: whatever the sampling, that token
    comes, and its log-probability is 0, also within the prompt.
    """

    def __init__(
        self,
        tokenizer: TokenDecoder | None = None,
        *,
        token_interval_s: float = 0.0,
        stop_token_ids: tuple[int, ...] = (),
        max_context: int = 4096,
        max_batch_size: int = 32,
        max_waiting: int = 256,
        max_resident_adapters: int = 16,
    ) -> None:
        self.max_context = max_context
        self._pieces = TokenPieces(tokenizer or ByteTokenizer())
        self._token_interval_s = token_interval_s
        self._stop_token_ids = frozenset(stop_token_ids)
        self._max_resident = max_resident_adapters
        self._batch = asyncio.Semaphore(max_batch_size)
        self._max_batch_size = max_batch_size
        self._places = Places(max_batch_size, max_waiting)
        self._num_running = 0
        self._num_generated = 0
        self._adapters: OrderedDict[str, AdapterRef] = OrderedDict()
        self._in_flight: Counter[str] = Counter()
        self._num_adapter_loads = 0
        self._adapter_load_s: deque[float] = deque(maxlen=32)
        self._running = False

    @property
    def healthy(self) -> bool:
        """Whether it can answer."""
        return self._running

    async def start(self) -> None:
        """Nothing to load."""
        self._running = True

    async def load_adapter(self, adapter: AdapterRef) -> None:
        """Make the id resident; evicts the least recently used idle one."""
        self._touch(adapter)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Delta]]:
        """Echo the prompt as n choices, one token of each per step."""
        self._check_running()
        check_request(request, max_context=self.max_context, vocab_size=None)
        self._places.take(request.n)
        adapter_id = request.adapter.id if request.adapter else None
        try:
            if request.adapter is not None:
                self._touch(request.adapter)
                self._in_flight[request.adapter.id] += 1
            async with aclosing(self._echo(request, f"[{adapter_id}] " if adapter_id else "")) as steps:
                async for deltas in steps:
                    yield deltas
        finally:
            self._places.give_back(request.n)
            if adapter_id is not None and self._in_flight[adapter_id]:
                self._in_flight[adapter_id] -= 1

    async def _echo(self, request: GenerateRequest, prefix: str) -> AsyncGenerator[list[Delta]]:
        """The steps of one request. Its choices move together, so they take one place in the batch."""
        words = [token for token in request.prompt_token_ids if token not in self._stop_token_ids]
        words = words or list(request.prompt_token_ids[-1:])
        choices = [
            ChoiceText(
                self._pieces,
                request,
                index,
                stop_token_ids=self._stop_token_ids,
                max_context=self.max_context,
                prefix=prefix,
            )
            for index in range(request.n)
        ]
        num_top = request.sampling.logprobs
        async with self._batch:
            self._num_running += request.n
            try:
                scores = None if num_top is None else [_sure(token, num_top) for token in request.prompt_token_ids[1:]]
                echo = echo_of(self._pieces, request, scores)
                if begun := [delta for choice in choices if (delta := choice.begin(echo)) is not None]:
                    yield begun
                for number, token in enumerate(words, start=1):
                    open_choices = [choice for choice in choices if choice.finish_reason is None]
                    if not open_choices:
                        return
                    await asyncio.sleep(self._token_interval_s)
                    self._check_running()
                    score, last = None if num_top is None else _sure(token, num_top), number == len(words)
                    deltas = [choice.push(token, score, last=last) for choice in open_choices]
                    self._num_generated += len(open_choices)
                    if sent := [delta for delta in deltas if delta is not None]:
                        yield sent
            finally:
                self._num_running -= request.n

    def stats(self) -> EngineStats:
        """Current counts."""
        return EngineStats(
            num_running=self._num_running,
            num_waiting=self._places.num_held - self._num_running,
            num_generated_tokens=self._num_generated,
            resident_adapters=tuple(self._adapters),
            num_adapter_loads=self._num_adapter_loads,
            adapter_load_s=tuple(self._adapter_load_s),
        )

    async def stop(self) -> None:
        """Open streams fail at their next token."""
        self._running = False

    def _check_running(self) -> None:
        if not self._running:
            raise EngineFailed("the engine is not running")

    def _touch(self, adapter: AdapterRef) -> None:
        """Resident and most recently used. There are no weights, so a full house of busy adapters is no obstacle."""
        if adapter.id in self._adapters:
            self._adapters.move_to_end(adapter.id)
            return
        started = time.perf_counter()
        if self._max_resident < 1:
            raise AdapterMismatch("this engine was started without room for adapters")
        if not adapter.folder.is_dir():
            raise AdapterMismatch(f"adapter {adapter.id} has no folder")
        idle = (other for other in self._adapters if not self._in_flight[other])
        if len(self._adapters) >= self._max_resident and (victim := next(idle, None)) is not None:
            del self._adapters[victim]
        self._adapters[adapter.id] = adapter
        self._num_adapter_loads += 1
        self._adapter_load_s.append(time.perf_counter() - started)


def _sure(token_id: int, num_top: int) -> Score:
    """All probability on one token."""
    return Score(0.0, ((token_id, 0.0),) if num_top else ())
