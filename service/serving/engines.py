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
from typing import TYPE_CHECKING, Any, Protocol, cast

from service.engine.protocol import Delta
from service.errors import Unavailable
from service.serving.messages import (
    Accepted,
    Deployable,
    Encoded,
    EncodeRequest,
    Received,
    Refused,
    Reply,
    ServeRequest,
    Target,
)
from service.serving.naming import ENGINE_DEPLOYMENT, app_name
from service.settings import Settings
from training.storage import Storage

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

    from service.metrics import Metrics
    from service.serving.replica import AnyCore

log = logging.getLogger(__name__)

MAX_SUBMITS = 4  # the first, and three after replicas that died before they answered
REPLICA_WAIT_S = 60.0  # until any replica has the request; a base of some GB loads within it
RETRY_AFTER_S = 2.0

Output = Accepted | list[Delta] | Encoded
Request = ServeRequest | EncodeRequest


class EngineClient(Protocol):
    """Where requests go. The first item of a stream is `Accepted`, or `Encoded` and the only one; ServiceError may be
    raised at any point."""

    def stream(self, target: Target, request: Request) -> AsyncGenerator[Output, None]:
        """Run one request. Close the generator when you stop reading: that frees its sequences."""
        ...

    async def prefetch(self, target: Target) -> None:
        """Make a fresh model resident before its first request; an optimisation that may fail silently."""
        ...

    async def close(self) -> None:
        """Let go of what the client holds; open streams end."""
        ...


class RayEngines:
    """Engines behind Serve handles: one hop per request, straight to a replica of the target's app."""

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    async def stream(self, target: Target, request: Request) -> AsyncGenerator[Output, None]:
        """Run one request; it is sent again, unseen by the client, as long as nothing of its output was read."""
        for num_left in reversed(range(MAX_SUBMITS)):
            has_started = False
            try:
                async with aclosing(self._attempt(target, request)) as outputs:
                    async for output in outputs:
                        has_started = True
                        yield output
                return
            except _ReplicaLost as lost:
                log.warning("request %s lost its replica: %s", request.request_id, lost)
                if has_started or num_left == 0:
                    message = "The replica that worked on this request was lost; send the request again."
                    raise Unavailable(message, code="replica_lost", retry_after_s=RETRY_AFTER_S) from None

    async def _attempt(self, target: Target, request: Request) -> AsyncGenerator[Output, None]:
        """One submission; _ReplicaLost if the replica ended before the request did."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import DeploymentUnavailableError

        replies = cast("DeploymentResponseGenerator[Reply]", self._handle(target.deployable).remote(request))
        is_open = True
        try:
            await _wait_for_replica(replies)
            async for reply in replies:
                yield _output(reply)
            is_open = False
        except DeploymentUnavailableError as error:
            raise Unavailable("The model could not be started.", retry_after_s=RETRY_AFTER_S) from error
        except RayTaskError:
            raise  # a fault in our own code: shown as a 500, and not tried again
        except RayError as error:
            is_open = False
            raise _ReplicaLost(type(error).__name__) from error
        finally:
            if is_open:  # leaving the loop does not end the replica's work by itself
                replies.cancel()

    def _handle(self, deployable: Deployable) -> DeploymentHandle[Any]:
        """The streaming handle of an app; made without asking whether the app is there, which would block."""
        name = app_name(self._instance_id, deployable)
        handle = self._handles.get(name)
        if handle is None:
            from ray import serve

            found = serve.get_deployment_handle(ENGINE_DEPLOYMENT, app_name=name, _check_exists=False)
            handle = self._handles[name] = found.options(stream=True, method_name="generate")
        return handle

    async def prefetch(self, target: Target) -> None:
        """Make a fresh model resident on one replica."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        handle = self._handle(target.deployable).options(stream=False, method_name="prefetch")
        with contextlib.suppress(RayError, RayServeException, TimeoutError):
            async with asyncio.timeout(REPLICA_WAIT_S):
                await handle.remote(target)

    async def close(self) -> None:
        """Forget the handles."""
        self._handles.clear()


class InProcessEngines:
    """Engines in this process, started on first use: for one machine without Ray, and for tests."""

    def __init__(self, settings: Settings, storage: Storage, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._storage = storage
        self._metrics = metrics
        self._cores: dict[str, asyncio.Task[AnyCore]] = {}

    async def stream(self, target: Target, request: Request) -> AsyncGenerator[Output, None]:
        """Run one request on the engine of its target."""
        core = await self.core(target.deployable)
        async with aclosing(core.generate(request)) as replies:  # type: ignore[arg-type]  # its own kind of core
            async for reply in replies:
                yield _output(reply)

    async def prefetch(self, target: Target) -> None:
        """Make a fresh model resident."""
        await (await self.core(target.deployable)).prefetch(target)

    async def close(self) -> None:
        """Stop all engines."""
        starts, self._cores = list(self._cores.values()), {}
        for core in await asyncio.gather(*starts, return_exceptions=True):
            if not isinstance(core, BaseException):
                await core.stop()

    async def core(self, deployable: Deployable) -> AnyCore:
        """The running replica of an app; a failed start is tried again by the next request."""
        start = self._cores.get(deployable.key)
        if start is None or (start.done() and (start.cancelled() or start.exception() is not None)):
            start = self._cores[deployable.key] = asyncio.create_task(self._start(deployable))
        return await asyncio.shield(start)

    async def _start(self, deployable: Deployable) -> AnyCore:
        from service.serving.replica import CORES

        core = CORES[deployable.task](self._settings, self._storage, deployable, self._metrics)
        await core.start()
        return core


class _ReplicaLost(Exception):
    """A replica ended in the middle of a request."""


async def _wait_for_replica(replies: AsyncIterator[Reply]) -> None:
    try:
        async with asyncio.timeout(REPLICA_WAIT_S):
            reply = await anext(replies)
    except TimeoutError:
        message = "No replica of this model became ready in time; it may still be starting."
        raise Unavailable(message, code="model_not_ready", retry_after_s=RETRY_AFTER_S) from None
    assert isinstance(reply, Received)


def _output(reply: Reply) -> Output:
    if isinstance(reply, Refused):
        raise reply.error
    assert not isinstance(reply, Received)
    return reply
