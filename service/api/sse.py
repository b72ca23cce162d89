"""Server-sent events in OpenAI's framing, and what a client's disconnect does. Owns no resource's JSON.

Leaving is noticed by one task per request that waits for the disconnect message: neither a handler that waits for the
engine nor a stream between two tokens would hear of it otherwise, and the engine would work for nobody.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.errors import to_service_error

_encode = json.encoder.encode_basestring_ascii
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

T = TypeVar("T")


class Disconnected(Exception):
    """The client went away; nobody reads the answer."""


class ClientGone(Response):
    """The answer that nobody reads; the status is nginx's for a client that closed the request."""

    def __init__(self) -> None:
        super().__init__(status_code=499)


class Connection:
    """The client's end of one request, whose body has been read."""

    def __init__(self, request: Request) -> None:
        self._gone = asyncio.create_task(_wait_for_disconnect(request.receive))

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of the work, or Disconnected with the work cancelled and cleaned up."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Disconnected
        finally:
            await _cancel(task)

    async def close(self) -> None:
        """Stop listening."""
        await _cancel(self._gone)


class EventStream(Response):
    """Sends frames as they come, and closes the generator however the answer ends."""

    media_type = "text/event-stream"

    def __init__(
        self, frames: AsyncGenerator[bytes, None], connection: Connection, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(headers={**HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._frames = frames
        self._connection = connection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call; the disconnect is heard by `connection`, which alone may receive."""
        try:
            await self._connection.unless_gone(self._send_all(send))
        except Disconnected:
            pass
        finally:
            await self._connection.close()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._frames) as frames:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def frame(value: object) -> bytes:
    """One event; JSON escapes line breaks, so it is always one line."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def encode_text(text: str) -> str:
    """A JSON string, by the one C function that json.dumps would end up in."""
    return _encode(text)


def error_frame(error: Exception) -> bytes:
    """The event that makes the client raise: an error after the answer has begun."""
    return frame(to_service_error(error).body())


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Task[Any]) -> None:
    """End a task and wait until it has cleaned up; what it raises on the way has no reader."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # marks it as seen
