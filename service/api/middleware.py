"""Around every request, as plain ASGI so that streams pass untouched: id, headers, key, body limit, log, metrics.

From the outside in: RequestContext (id, timing, log line, faults to JSON) → KeyCheck → BodyLimit → the app's routes.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any, Final

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_response
from service.auth import Authenticator
from service.errors import InvalidRequest, ServiceError, TooLarge
from service.logs import request_id
from service.platform import Platform

log = logging.getLogger(__name__)

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OPENAI_VERSION: Final = "2020-10-01"
OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})  # everything else needs a key, unknown paths included
UPLOAD_PATHS: Final = frozenset({"/v1/files"})  # streamed to storage under a limit of their own

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def install_middleware(app: FastAPI, *, adds_request_id: bool = True) -> None:
    """Put the layers around the app. `adds_request_id=False` where the server in front already answers with the id
    that it passed in (Ray Serve does, and two headers would reach the client as one joined value)."""
    platform: Platform = app.state.platform
    app.add_middleware(BodyLimit, max_body_bytes=platform.settings.max_body_bytes)
    app.add_middleware(KeyCheck, authenticator=Authenticator(platform.db))
    app.add_middleware(RequestContext, platform=platform, adds_request_id=adds_request_id)


def route_path(scope: Scope) -> str:
    """The path below the mount point."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if root and path.startswith(root + "/") else path


class RequestContext:
    """Names the request, measures and logs it, and turns what nobody caught into a 500 without details."""

    def __init__(self, app: ASGIApp, platform: Platform, adds_request_id: bool) -> None:
        self._app = app
        self._metrics = platform.metrics
        self._adds_request_id = adds_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        name = _request_id_of(Headers(scope=scope))
        token = request_id.set(name)
        state = scope.setdefault("state", {})
        state["request_id"], state["received_at"] = name, time.time()
        if len(scope["path"]) > 1:
            scope["path"] = scope["path"].rstrip("/") or "/"
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._name(message, name, time.perf_counter() - started)
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception as error:  # the edge of the process: the request's id and the traceback are kept in the log
            if status:
                log.exception("the answer broke off")
                raise  # the server cuts the connection, so that the client does not take half an answer for a whole
            if not isinstance(error, ServiceError):
                log.exception("internal fault")
            await error_response(error)(scope, receive, send_named)
        finally:
            self._record(scope, status, time.perf_counter() - started)
            request_id.reset(token)

    def _name(self, message: Message, name: str, passed_s: float) -> None:
        headers = MutableHeaders(scope=message)
        if self._adds_request_id:
            headers["x-request-id"] = name
        headers["openai-processing-ms"] = str(round(passed_s * 1000))
        headers["openai-version"] = OPENAI_VERSION

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """One log line and one observation. Neither holds headers, query or body, where secrets could be."""
        status = status or 499  # nothing was sent: the client went away first
        template = getattr(scope.get("route"), "path", "unmatched")
        caller = scope["state"].get("caller")
        line = {
            "method": scope["method"],
            "path": scope["path"][:512],
            "status": status,
            "seconds": round(seconds, 4),
            "key_id": caller.key_id if caller else None,
        }
        log.info("request", extra={"fields": line})
        method = scope["method"] if scope["method"] in METHODS else "other"  # clients must not make up label values
        self._metrics.observe_request(template, method, status, seconds)


def _request_id_of(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else "req_" + secrets.token_hex(16)


class KeyCheck:
    """Lets nothing but health pass without a valid key, before a route is looked up or a byte of body read."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and route_path(scope) not in OPEN_PATHS:
            authorization = Headers(scope=scope).get("authorization")
            scope["state"]["caller"] = await run_in_threadpool(self._authenticator.caller, authorization)
        await self._app(scope, receive, send)


class BodyLimit:
    """Reads the body of everything but uploads up to the limit, counted as it arrives, and hands it on whole."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if "\0" in scope["path"] or b"%00" in scope.get("query_string", b""):
            raise InvalidRequest("The URL must not contain NUL characters.")
        if scope["method"] == "POST" and route_path(scope) in UPLOAD_PATHS:
            await self._app(scope, receive, send)
            return
        body = await self._read(Headers(scope=scope), receive)
        if body is None:  # the client went away
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        declared = headers.get("content-length", "")
        if declared.isdecimal() and len(declared) < 20:
            self._check(int(declared))
        chunks: list[bytes] = []
        size = 0
        while True:
            message: Any = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            self._check(size)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _check(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise TooLarge(f"The request body is larger than the limit of {self._max_body_bytes} bytes.")
