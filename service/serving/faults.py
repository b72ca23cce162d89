"""Any failure of a request on a replica, as what its client may hear. Faults of ours are logged here."""

from __future__ import annotations

import logging

from service.engine.admission import EngineFailed, UnfitRequest
from service.engine.protocol import AdapterMismatch, QueueFull
from service.errors import InvalidRequest, RateLimited, ServiceError, Unavailable
from training.artifact import BrokenFolder
from training.render import RenderError

log = logging.getLogger(__name__)

QUEUE_RETRY_AFTER_S = 1.0


def as_service_error(error: Exception, request_id: str, model_id: str, param: str) -> ServiceError:
    """`param` is the request field that holds the prompt or the input."""
    match error:
        case ServiceError():
            return error
        case QueueFull():
            message = "The model is busy: too many requests are waiting. Try again shortly."
            return RateLimited(message, retry_after_s=QUEUE_RETRY_AFTER_S)
        case RenderError():
            return InvalidRequest(f"The model cannot take this prompt: {error}", param=param)
        case AdapterMismatch() | BrokenFolder():
            log.error("model %s cannot be served: %s", model_id, error)
            return ServiceError("The model cannot be served: its files do not fit its base, or are damaged.")
        case EngineFailed():
            return Unavailable("The engine stopped; the request can be sent again.", retry_after_s=QUEUE_RETRY_AFTER_S)
        case UnfitRequest():
            return InvalidRequest(f"The model cannot take this request: {error}")
        case _:
            log.exception("request %s failed", request_id, exc_info=error)
            return ServiceError("The service had an internal fault; the request id finds it in the service's log.")
