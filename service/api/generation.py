"""What chat completions and completions have in common: from a parsed request to a stream of output, and its costs.

A request is one or more prompts with n choices each; choices are numbered over all of them. Owns no resource's JSON:
an `Answer` writes that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from service.api.inference_schemas import Sampling
from service.api.sse import DONE, ClientGone, Connection, Disconnected, EventStream, error_frame
from service.auth import Caller
from service.engine.protocol import Delta, TokenLogprob
from service.errors import InvalidRequest, NotFound, ServiceError
from service.platform import Platform
from service.serving.engines import Output
from service.serving.messages import Accepted, Prompt, ServeRequest, Target
from service.settings import Settings
from service.store import usage

log = logging.getLogger("tunesmith.inference")

_accounting: set[asyncio.Task[None]] = set()  # a task that nobody holds may vanish before it has run


@dataclass
class Usage:
    """Tokens of one request so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompts', those that were not read anew

    def to_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


@dataclass
class Choice:
    """One choice in one piece."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """The next part of it."""
        self.text += delta.text
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.logprobs += delta.logprobs


class Answer(Protocol):
    """Writes one resource's JSON."""

    def opening(self) -> bytes:
        """Frames before the first output."""
        ...

    def chunks(self, deltas: list[Delta]) -> bytes:
        """Frames of new output."""
        ...

    def usage_chunk(self, used: Usage) -> bytes:
        """The last frame before the end, where the request asks for it."""
        ...

    def whole(self, choices: list[Choice], used: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        ...


class Generation:
    """One request's work on the engines. Read `outputs` to the end or close it; either way the tokens are counted."""

    def __init__(self, platform: Platform, caller: Caller, requests: list[ServeRequest], received_at: float) -> None:
        self._platform = platform
        self._caller = caller
        self._requests = requests
        self._received_at = received_at
        self.target = requests[0].target
        self.num_choices = sum(request.n for request in requests)
        self.used = Usage()
        _check_capacity(platform.settings, self.num_choices)

    async def outputs(self) -> AsyncGenerator[list[Delta], None]:
        """New output, choices numbered over all prompts. Nothing comes before every prompt was accepted."""
        is_first = True
        streams = [self._stream(number, request) for number, request in enumerate(self._requests)]
        merged = streams[0] if len(streams) == 1 else _merge(streams)
        try:
            async with aclosing(merged) as outputs:
                async for deltas in outputs:
                    if is_first:
                        is_first = False
                        waited_s = max(0.0, time.time() - self._received_at)
                        self._platform.metrics.observe_first_token(self.target.base_id, waited_s)
                    yield deltas
        finally:
            account(self._platform, self._caller, self.target, self.used)

    async def _stream(self, number: int, request: ServeRequest) -> AsyncGenerator[list[Delta], None]:
        async with aclosing(self._platform.engines.stream(self.target, request)) as outputs:
            async for output in outputs:
                deltas = self._count(output)
                offset = number * request.n
                yield [replace(delta, index=delta.index + offset) for delta in deltas] if offset else deltas

    def _count(self, output: Output) -> list[Delta]:
        deltas = output
        if isinstance(output, Accepted):
            self.used.prompt_tokens += output.num_prompt_tokens
            self.used.cached_tokens += output.num_cached_tokens
            deltas = output.deltas
        assert isinstance(deltas, list)
        self.used.completion_tokens += sum(delta.num_tokens for delta in deltas)
        return deltas


def account(platform: Platform, caller: Caller, target: Target, used: Usage) -> None:
    """Count the tokens, also of a broken-off request; the row is written beside the answer, not before its end."""
    if used.prompt_tokens == 0:
        return
    platform.metrics.add_tokens(
        target.base_id,
        prompt_tokens=used.prompt_tokens,
        completion_tokens=used.completion_tokens,
        cached_tokens=used.cached_tokens,
    )
    task = asyncio.create_task(run_in_threadpool(_add_usage, platform, caller, target, used))
    _accounting.add(task)
    task.add_done_callback(_accounted)


def _add_usage(platform: Platform, caller: Caller, target: Target, used: Usage) -> None:
    with platform.db.write() as tx:
        usage.add(
            tx,
            key_id=caller.key_id,
            project_id=caller.project_id,
            model_id=target.model_id,
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
        )


def _check_capacity(settings: Settings, num_choices: int) -> None:
    """Refuse what all replicas together could never hold: told to wait, the client would try again for ever."""
    capacity = (settings.max_batch_size + settings.max_waiting) * settings.engine_max_replicas
    if num_choices > capacity:
        message = f"The request asks for {num_choices} choices, 'n' of each prompt; at most {capacity} can be served."
        raise InvalidRequest(message, param="n")


def _accounted(task: asyncio.Task[None]) -> None:
    _accounting.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("usage of a request was not stored", exc_info=error)


# What a model can do -> how such a model is called, and the endpoint for it.
_ENDPOINTS = {
    "chat": ("a chat model", "v1/chat/completions"),
    "completions": ("a completion model", "v1/completions"),
    "classify": ("a classifier", "v1/classify or v1/decisions"),
    "embed": ("an embedding model", "v1/embeddings"),
}


async def resolve(platform: Platform, caller: Caller, name: str) -> Target:
    """What the name means now."""
    if (known := platform.catalog.known(caller.project_id, name, caller.catalog_version)) is not None:
        return known
    return await run_in_threadpool(platform.catalog.lookup, caller.project_id, name)


def require(target: Target, capability: str, endpoint: str) -> None:
    """NotFound that says which endpoint to use, if the model cannot do what this one asks of it."""
    if capability in target.capabilities:
        return
    able = [_ENDPOINTS[name] for name in _ENDPOINTS if name in target.capabilities]
    kind = able[0][0] if able else "a model that can only be fine-tuned"
    is_not = "not a chat model and thus not" if capability == "chat" else f"{kind} and not"  # OpenAI's words
    hint = f" Did you mean to use {able[0][1]}?" if able else ""
    message = f"This is {is_not} supported in the {endpoint} endpoint.{hint}"
    raise NotFound(message, param="model", code="model_not_supported")


def serve_requests(
    request_id: str, target: Target, prompts: list[Prompt], body: Sampling, **options: Any
) -> list[ServeRequest]:
    """One engine request per prompt, with OpenAI's defaults."""
    return [
        ServeRequest(
            request_id=f"{request_id}-{number}",
            target=target,
            prompt=prompt,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            n=body.n or 1,
            seed=body.seed,
            stop=tuple(body.stop or ()),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=tuple((body.logit_bias or {}).items()),
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            is_streamed=bool(body.stream),
            **options,
        )
        for number, prompt in enumerate(prompts)
    ]


async def respond(request: Request, generation: Generation, answer: Answer, body: Sampling) -> Response:
    """The HTTP answer, streamed or whole. What goes wrong before the first output is an HTTP error in both cases."""
    outputs = generation.outputs()
    headers = {"x-model-version": generation.target.model_id}
    async with AsyncExitStack() as stack:
        connection = Connection(request)
        stack.push_async_callback(connection.close)
        stack.push_async_callback(outputs.aclose)
        try:
            if not body.stream:
                whole = await connection.unless_gone(_whole(generation, outputs, answer))
                return JSONResponse(whole, headers=headers)
            first = await connection.unless_gone(_first(outputs))
        except Disconnected:
            return ClientGone()
        stack.pop_all()  # from here on the stream closes both
    frames = _frames(first, outputs, answer, generation.used if body.wants_usage else None)
    return EventStream(frames, connection, headers)


async def _first(outputs: AsyncGenerator[list[Delta], None]) -> list[Delta]:
    return await anext(outputs)


async def _whole(generation: Generation, outputs: AsyncGenerator[list[Delta], None], answer: Answer) -> dict[str, Any]:
    choices = [Choice() for _ in range(generation.num_choices)]
    async for deltas in outputs:
        for delta in deltas:
            choices[delta.index].add(delta)
    assert all(choice.finish_reason for choice in choices), "the engine ended without finishing every choice"
    return answer.whole(choices, generation.used)


async def _frames(
    first: list[Delta], outputs: AsyncGenerator[list[Delta], None], answer: Answer, used: Usage | None
) -> AsyncGenerator[bytes, None]:
    """The body of a stream. An error now can only be told as an event: the status has been sent."""
    async with aclosing(outputs):
        try:
            yield answer.opening() + answer.chunks(first)
            async for deltas in outputs:
                yield answer.chunks(deltas)
        except ServiceError as error:
            yield error_frame(error)
        except Exception as error:  # a process edge: the client is told, the traceback is kept in the log
            log.exception("a stream broke off")
            yield error_frame(error)
        else:
            yield (answer.usage_chunk(used) if used is not None else b"") + DONE


async def _merge(streams: list[AsyncGenerator[list[Delta], None]]) -> AsyncGenerator[list[Delta], None]:
    """All streams as one, from the moment when all have begun; the first error ends all."""
    queue: asyncio.Queue[tuple[int, list[Delta] | Exception | None]] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(number, stream, queue)) for number, stream in enumerate(streams)]
    held: list[Delta] = []
    silent, num_open = set(range(len(streams))), len(streams)
    try:
        while num_open:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
                continue
            held += item
            silent.discard(number)
            if not silent:
                yield held
                held = []
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.wait(pumps)


async def _pump(
    number: int,
    stream: AsyncGenerator[list[Delta], None],
    queue: asyncio.Queue[tuple[int, list[Delta] | Exception | None]],
) -> None:
    """Move a stream's output into the queue, then None or what it raised."""
    try:
        async with aclosing(stream):
            async for deltas in stream:
                queue.put_nowait((number, deltas))
        queue.put_nowait((number, None))
    except Exception as error:  # handed on whole: the reader of the queue raises it
        queue.put_nowait((number, error))
