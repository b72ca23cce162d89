"""The gateway's way to the engines: one call that streams a request's output, over Ray Serve or in this process.

Both clients keep the same promises: the first item is `Accepted`, errors are raised as `ServiceError` (also after the
first item), and closing the iterator frees the request's sequences.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from service.engine.protocol import Delta
from service.errors import ServiceError, Unavailable
from service.serving.messages import Accepted, Deployable, Received, Refused, Reply, ServeRequest, Target
from service.serving.naming import ENGINE_DEPLOYMENT, app_name
from service.settings import Settings
from training.storage import Storage

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

    from service.metrics import Metrics
    from service.serving.replica import ReplicaCore

log = logging.getLogger(__name__)

MAX_SUBMITS = 4  # the first, and three after replicas that died before they answered
REPLICA_WAIT_S = 60.0  # until any replica has the request; a base of some GB loads within it
RETRY_AFTER_S = 2.0

Output = Accepted | list[Delta]


class EngineClient(Protocol):
    """Where requests go. The first item of a stream is `Accepted`; ServiceError may be raised at any point."""

    def stream(self, target: Target, request: ServeRequest) -> AsyncGenerator[Output, None]:
        """Run one request. Close the generator when you stop reading: that frees its sequences."""
        ...

    async def prefetch(self, target: Target) -> None:
        """Make a fresh model resident before its first request; an optimisation that may fail silently."""
        ...

    async def close(self) -> None:
        """Let go of what the client holds; open streams end."""
        ...
