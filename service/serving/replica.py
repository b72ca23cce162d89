"""One replica: a base with all adapters on it, or one full fine-tuned model, behind `generate`.

`ReplicaCore` knows neither Ray nor Serve, so it also runs in a gateway process or a test. Torch is imported only when
the native engine is built: this module can be shipped from a process without it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol, cast

from service.engine.admission import EngineFailed
from service.engine.echo import EchoEngine
from service.engine.protocol import Delta, Engine, EngineStats, GenerateRequest, SamplingParams
from service.errors import InvalidRequest
from service.metrics import Metrics
from service.serving.adapters import AdapterShelf, Prepared, open_folder
from service.serving.coalesce import coalesce
from service.serving.encoder_replica import EncoderCore
from service.serving.faults import as_service_error
from service.serving.messages import (
    Accepted,
    ChatPrompt,
    Deployable,
    EncodeRequest,
    Received,
    Refused,
    Reply,
    ServeRequest,
    Target,
    Task,
    TextPrompt,
)
from service.settings import Settings
from training.render import Renderer
from training.storage import Storage

STATS_INTERVAL_S = 1.0
_MESSAGES_PER_CORE_S = 50  # of the machine, for all streams of a replica; their way takes a twentieth of the core
_NUM_CORES = os.cpu_count() or 1
_UNSEEN_PAUSE_S = 1.0  # of an answer that is sent as a whole; what a broken-off one cost is known up to then

Replies = AsyncGenerator[Accepted | list[Delta] | Refused, None]


class HealthyEngine(Engine, Protocol):
    """An engine that knows whether it can still answer."""

    @property
    def healthy(self) -> bool:
        """False once it stopped or broke."""
        ...


class ReplicaCore:
    """Renders, checks and generates. Every error of a request is a `Refused` item; only cancellation is raised."""

    def __init__(
        self, settings: Settings, storage: Storage, deployable: Deployable, metrics: Metrics | None = None
    ) -> None:
        self._settings = settings
        self._storage = storage
        self._deployable = deployable
        self._metrics = metrics if metrics is not None else Metrics()
        self._num_requests = 0  # open ones
        self._num_loads_seen = self._num_preempted_seen = 0
        self._stats_task: asyncio.Task[None] | None = None
        self.engine: HealthyEngine
        self._renderer: Renderer
        self._shelf: AdapterShelf

    async def start(self) -> None:
        """Load the folder; returns when requests can be answered. BrokenFolder if it is not the recorded one."""
        await asyncio.to_thread(self._load)
        await self.engine.start()
        self._stats_task = asyncio.create_task(self._watch_stats())

    def _load(self) -> None:
        opened = open_folder(self._storage, self._deployable.folder)
        self._renderer = opened.renderer
        self._shelf = AdapterShelf(self._storage, opened.manifest, self._renderer)
        self.engine = build_engine(self._settings, self._storage, self._deployable, self._renderer)

    async def stop(self) -> None:
        """End all requests and free the weights."""
        if self._stats_task is not None:
            self._stats_task.cancel()
            await asyncio.wait({self._stats_task})
        await self.engine.stop()

    def check_health(self) -> None:
        """Raises when the engine can no longer answer."""
        if not self.engine.healthy:
            raise EngineFailed("the engine has stopped")

    async def generate(self, request: ServeRequest) -> Replies:
        """Answer one request: `Accepted` with the first deltas, more deltas; `Refused` may end it at any point."""
        self._num_requests += 1
        try:
            adapter = await self._resident(request.target) if request.target.adapter is not None else None
            renderer = adapter.renderer if adapter is not None else self._renderer
            token_ids = await asyncio.to_thread(_render, renderer, request)
            limit = _max_tokens(request, len(token_ids), self._max_context(request.target))
            work = _engine_request(request, token_ids, limit, adapter)
            async with aclosing(self._deltas(request, work)) as groups:
                is_first = True
                async for deltas in groups:
                    yield _accepted(len(token_ids), deltas) if is_first else deltas
                    is_first = False
        except Exception as error:  # a process edge: errors travel as values, and faults of ours are logged here
            param = "messages" if isinstance(request.prompt, ChatPrompt) else "prompt"
            yield Refused(as_service_error(error, request.request_id, request.target.model_id, param))
        finally:
            self._num_requests -= 1

    def _deltas(self, request: ServeRequest, work: GenerateRequest) -> AsyncGenerator[list[Delta], None]:
        source = cast(AsyncGenerator[list[Delta], None], self.engine.generate(work))
        return coalesce(source, lambda: self._pause_s(request))

    def _pause_s(self, request: ServeRequest) -> float:
        """Between two messages of a stream. The way of each to the client costs a millisecond of a core, which the
        engine lacks where it shares the cores: so the streams of a replica share a number of messages."""
        if not request.is_streamed:
            return _UNSEEN_PAUSE_S
        return max(self._settings.coalesce_ms / 1000, self._num_requests / (_MESSAGES_PER_CORE_S * _NUM_CORES))

    def _max_context(self, target: Target) -> int:
        return min(target.max_context, self.engine.max_context)

    async def prefetch(self, target: Target) -> None:
        """Make an adapter resident ahead of its first request."""
        if target.adapter is not None:
            await self._resident(target)

    async def _resident(self, target: Target) -> Prepared:
        """The adapter, prepared; the first use also loads it, which is the hot swap whose time counts."""
        if self._shelf.is_ready(target.model_id):
            return await self._shelf.get(target)
        started = time.perf_counter()
        prepared = await self._shelf.get(target)
        await self.engine.load_adapter(prepared.ref)
        self._metrics.observe_swap(target.base_id, time.perf_counter() - started)
        return prepared

    def stats(self) -> EngineStats:
        """The engine's counts."""
        return self.engine.stats()

    async def _watch_stats(self) -> None:
        while True:
            self._record_stats()
            await asyncio.sleep(STATS_INTERVAL_S)

    def _record_stats(self) -> None:
        stats, base_id = self.engine.stats(), self._deployable.base_id
        self._metrics.set_engine(base_id, stats.num_running, stats.num_waiting, len(stats.resident_adapters))
        self._metrics.add_preemptions(base_id, stats.num_preempted - self._num_preempted_seen)
        self._num_preempted_seen = stats.num_preempted
        num_new = stats.num_adapter_loads - self._num_loads_seen
        self._num_loads_seen = stats.num_adapter_loads
        for seconds in stats.adapter_load_s[len(stats.adapter_load_s) - num_new :] if num_new > 0 else ():
            self._metrics.observe_adapter_load(base_id, seconds)


AnyCore = ReplicaCore | EncoderCore
CORES: dict[Task, type[AnyCore]] = {"generate": ReplicaCore, "classify": EncoderCore, "embed": EncoderCore}


class EngineReplica:
    """The Serve deployment around a core: builds it in the replica's process, and tells at once of each arrival."""

    async def __init__(  # type: ignore[misc]  # Serve awaits an async constructor: the engine needs the loop
        self, settings: dict[str, Any], instance_id: str, deployable: Deployable
    ) -> None:
        from service.jobs.orchestrator_actor import hub_client
        from service.logs import configure_logging

        self._settings = Settings(**settings)
        configure_logging(self._settings.log_level)
        self._metrics = Metrics(hub_client(instance_id))
        storage = Storage(self._settings.resolved_storage_url)
        self._core = CORES[deployable.task](self._settings, storage, deployable, self._metrics)
        await self._core.start()
        self._pushing = asyncio.create_task(self._push())

    async def _push(self) -> None:
        async with self._metrics.pushing():
            await asyncio.Event().wait()

    async def generate(self, request: ServeRequest | EncodeRequest) -> AsyncGenerator[Reply, None]:
        """See ReplicaCore.generate and EncoderCore.generate."""
        yield Received()
        async with aclosing(self._core.generate(request)) as replies:  # type: ignore[arg-type]  # its own kind of core
            async for reply in replies:
                yield reply

    async def prefetch(self, target: Target) -> None:
        """See ReplicaCore.prefetch."""
        await self._core.prefetch(target)

    async def check_health(self) -> None:
        """Serve's periodic call; a replica that raises is replaced."""
        self._core.check_health()

    async def stats(self) -> EngineStats:
        """The engine's counts, for tests and tools."""
        return self._core.stats()


class AppRoot:
    """The root of an engine app: never called. A root opens a port of its own, so the engine is its child."""

    def __init__(self, engine: object) -> None:
        pass


def build_engine(settings: Settings, storage: Storage, deployable: Deployable, renderer: Renderer) -> HealthyEngine:
    """The engine of the settings for a folder that was checked."""
    if settings.engine == "echo":
        return EchoEngine(
            renderer.tokenizer,
            token_interval_s=settings.echo_token_interval_ms / 1000,
            stop_token_ids=renderer.stop_token_ids,
            max_batch_size=settings.max_batch_size,
            max_waiting=settings.max_waiting,
            max_resident_adapters=settings.max_resident_adapters,
        )
    if deployable.base_id in settings.vllm_bases.split(","):
        from service.engine.vllm import VllmEngine

        return VllmEngine(
            storage.local_folder(deployable.folder.key),
            tokenizer=renderer.tokenizer,
            dtype=settings.engine_dtype,
            max_batch_size=settings.max_batch_size,
            max_waiting=settings.max_waiting,
            max_resident_adapters=settings.max_resident_adapters,
            num_gpus=int(settings.engine_num_gpus),
            stop_token_ids=renderer.stop_token_ids,
        )
    from service.engine.native.engine import NativeEngine

    return NativeEngine(
        storage.local_folder(deployable.folder.key),
        tokenizer=renderer.tokenizer,
        dtype=settings.engine_dtype,
        max_batch_size=settings.max_batch_size,
        max_waiting=settings.max_waiting,
        max_resident_adapters=settings.max_resident_adapters,
        num_threads=settings.resolved_engine_num_threads,
        stop_token_ids=renderer.stop_token_ids,
    )


def _accepted(num_prompt_tokens: int, deltas: list[Delta]) -> Accepted:
    """The choices of a request share one prompt, so what one of them found in the cache counts once."""
    return Accepted(num_prompt_tokens, deltas, max(delta.num_cached_tokens for delta in deltas))


def _render(renderer: Renderer, request: ServeRequest) -> tuple[int, ...]:
    prompt = request.prompt
    for token_id, _ in request.logit_bias:
        if token_id >= renderer.vocab_size:
            message = f"Token id {token_id} is outside this model's vocabulary of {renderer.vocab_size}."
            raise InvalidRequest(message, param="logit_bias")
    if isinstance(prompt, ChatPrompt):
        messages = [message.model_dump(mode="json", exclude_none=True) for message in prompt.messages]
        return tuple(renderer.encode_prompt(messages))
    if isinstance(prompt, TextPrompt):
        return tuple(renderer.encode_text(prompt.text))
    if max(prompt.token_ids, default=0) >= renderer.vocab_size:
        message = f"A token id is outside this model's vocabulary of {renderer.vocab_size}."
        raise InvalidRequest(message, param="prompt")
    return prompt.token_ids


def _max_tokens(request: ServeRequest, num_prompt: int, max_context: int) -> int:
    """How many tokens may be generated; InvalidRequest in OpenAI's words if prompt and wish do not fit the context."""
    is_chat = isinstance(request.prompt, ChatPrompt)
    param = "messages" if is_chat else "prompt"
    limit = f"This model's maximum context length is {max_context} tokens."
    if num_prompt == 0:
        raise InvalidRequest("The prompt must not be empty: this model puts no token of its own in front.", param=param)
    if num_prompt + (request.max_tokens != 0) > max_context:
        message = (
            f"{limit} However, your {param} resulted in {num_prompt} tokens. Please reduce the length of the {param}."
        )
        raise InvalidRequest(message, param=param, code="context_length_exceeded")
    left = max_context - num_prompt
    if request.max_tokens is None:
        return min(left, request.default_max_tokens or left)
    if request.max_tokens > left:
        message = (
            f"{limit} However, you requested {num_prompt + request.max_tokens} tokens ({num_prompt} in the {param}, "
            f"{request.max_tokens} in the completion). Please reduce the length of the {param} or completion."
        )
        raise InvalidRequest(message, param=request.max_tokens_param, code="context_length_exceeded")
    return request.max_tokens


def _engine_request(
    request: ServeRequest, token_ids: tuple[int, ...], max_tokens: int, adapter: Prepared | None
) -> GenerateRequest:
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stop=request.stop,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        top_k=request.top_k,
        min_p=request.min_p,
        logprobs=request.logprobs,
    )
    ref = adapter.ref if adapter is not None else None
    return GenerateRequest(request.request_id, token_ids, sampling, n=request.n, adapter=ref, echo=request.echo)
