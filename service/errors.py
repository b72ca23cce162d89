"""The error tree. Each error knows its HTTP status, OpenAI code and type; `api` turns it into OpenAI's JSON shape.

Raise these for what a user can mend. Our own mistakes stay assertions and surface as a logged 500 without details.
"""

from __future__ import annotations


class ServiceError(Exception):
    """Something a client must hear about. `param` is the dotted request field, `retry_after_s` becomes a header."""

    status = 500
    type = "server_error"
    code: str | None = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling between Ray processes with all fields."""
        return _rebuild, (type(self), self.message, self.param, self.code, self.retry_after_s)

    def body(self) -> dict[str, object]:
        """OpenAI's error JSON."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def _rebuild(cls: type[ServiceError], message: str, param: str | None, code: str | None, after: float | None) -> object:
    return cls(message, param=param, code=code, retry_after_s=after)


class InvalidRequest(ServiceError):
    """The request is wrong as it stands."""

    status, type, code = 400, "invalid_request_error", "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """A field of OpenAI's that we do not honour: refused, never dropped."""

    code = "unsupported_parameter"


class Unauthorized(ServiceError):
    """No key, or not one of ours."""

    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class Forbidden(ServiceError):
    """The key lacks the scope."""

    status, type, code = 403, "invalid_request_error", "insufficient_permissions"


class NotFound(ServiceError):
    """No such object in the key's project."""

    status, type, code = 404, "invalid_request_error", "not_found"


class MethodNotAllowed(ServiceError):
    """The route exists, the method does not."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class TooLarge(ServiceError):
    """The body is over the limit."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class RateLimited(ServiceError):
    """Too much at once; `retry_after_s` says when to come back."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class Unavailable(ServiceError):
    """A part is starting or was lost; a retry will find it back."""

    status, type, code = 503, "server_error", "service_unavailable"


class TooSlow(ServiceError):
    """What was asked takes longer than a request may wait; asking again would take as long."""

    status, type, code = 504, "server_error", "timeout"
