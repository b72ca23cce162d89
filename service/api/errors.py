"""Every failure as OpenAI's error JSON. The one place where exceptions become HTTP answers."""

from __future__ import annotations

import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service.api.validation import explain
from service.errors import InvalidRequest, MethodNotAllowed, NotFound, ServiceError, TooLarge, TooSlow, Unavailable

log = logging.getLogger(__name__)

DATABASE_RETRY_AFTER_S = 1.0


def install_error_handlers(app: FastAPI) -> None:
    """Answer in OpenAI's shape whatever a route raises. Faults of our own are caught by the middleware around."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException) and error.status_code == 404:
            error = _no_route(request)
        headers = _allow_header(request) if _is_405(error) else {}
        return error_response(error, headers)

    for kind in (ServiceError, RequestValidationError, HTTPException, OperationalError, PoolTimeout):
        app.add_exception_handler(kind, handle)


def error_response(error: Exception, headers: dict[str, str] | None = None) -> JSONResponse:
    """The HTTP answer to an exception."""
    known = to_service_error(error)
    headers = dict(headers or {})
    if known.retry_after_s is not None:
        # Clients read the exact milliseconds first; the plain header takes whole seconds only.
        headers["retry-after"] = str(max(1, math.ceil(known.retry_after_s)))
        headers["retry-after-ms"] = str(round(known.retry_after_s * 1000))
    if isinstance(known, TooSlow):
        headers["x-should-retry"] = "false"  # or the openai client would do it twice more
    return JSONResponse(known.body(), status_code=known.status, headers=headers)


def to_service_error(error: Exception) -> ServiceError:
    """Any exception as one that may be shown; what we do not know becomes a 500 without details."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, RequestValidationError):
        return explain(error)
    if isinstance(error, HTTPException):
        return _from_http(error)
    if isinstance(error, OperationalError | PoolTimeout):
        log.warning("the database did not answer: %s", error.orig if isinstance(error, OperationalError) else error)
        return Unavailable("The database is busy or unreachable; try again.", retry_after_s=DATABASE_RETRY_AFTER_S)
    return ServiceError("The service had an internal fault; the request id finds it in the service's log.")


def _from_http(error: HTTPException) -> ServiceError:
    if error.status_code == 405:
        return MethodNotAllowed("This URL exists, but not for this HTTP method; see the Allow header.")
    if error.status_code == 413:
        return TooLarge(f"The request body is too large: {error.detail}")
    if error.status_code < 500:
        return InvalidRequest(f"The request body could not be read: {error.detail}", code="invalid_body")
    return ServiceError("The service had an internal fault; the request id finds it in the service's log.")


def _no_route(request: Request) -> NotFound:
    """Whether a base_url is wrong, or a part of OpenAI's API is asked for that is not here: the path tells."""
    path = request.scope["path"]
    hint = "This service does not have it." if "/v1/" in path else "Check the path, and that base_url ends in '/v1'."
    return NotFound(f"Unknown request URL: {request.method} {path[:200]}. {hint}", code="unknown_url")


def _is_405(error: Exception) -> bool:
    return isinstance(error, HTTPException) and error.status_code == 405


def _allow_header(request: Request) -> dict[str, str]:
    """Every method that this path has: the framework's own header knows only the first route's."""
    allowed = [
        method
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
        if any(route.matches({**request.scope, "method": method})[0] == Match.FULL for route in request.app.routes)
    ]
    return {"allow": ", ".join(allowed)}
