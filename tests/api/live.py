"""A service of its own for tests that need other settings than the shared one, and callable models for both."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from openai import AsyncOpenAI, OpenAI

from service.app import build_app
from service.metrics import Metrics
from service.platform import Platform
from service.serving.catalog import Catalog
from service.serving.engines import InProcessEngines
from service.store import keys
from tests.api.conftest import _Server
from tests.serving.world import add_base, new_world

ECHO = "echo-base"


@contextmanager
def live_service(home: Path, **settings: object) -> Iterator[tuple[Platform, str, str]]:
    """Platform, base_url and admin key of a running service with one callable base."""
    made, db, storage, instance_id = new_world(home, **settings)
    add_base(db, storage, ECHO)
    secret = keys.new_secret()
    with db.write() as tx:
        keys.put_admin(tx, secret)
    metrics = Metrics()
    engines = InProcessEngines(made, storage, metrics)
    platform = Platform(made, instance_id, db, storage, Catalog(db), engines, metrics)
    listener = socket.create_server(("127.0.0.1", 0))
    server = _Server(uvicorn.Config(build_app(platform), log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    assert server.listening.wait(30), "the service did not start"
    try:
        yield platform, f"http://127.0.0.1:{listener.getsockname()[1]}/v1", secret
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        db.close()


def sync_client(url: str, secret: str) -> OpenAI:
    """The real client; it does not retry, so that tests see the first answer."""
    return OpenAI(base_url=url, api_key=secret, max_retries=0)


def async_client(url: str, secret: str) -> AsyncOpenAI:
    """The real asynchronous client."""
    return AsyncOpenAI(base_url=url, api_key=secret, max_retries=0)
