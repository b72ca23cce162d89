"""A service of its own for tests that need other settings than the shared one, and callable models for both."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from openai import AsyncOpenAI, OpenAI

from service.app import build_app
from service.jobs.launchers import InProcessLauncher, LoopFit
from service.jobs.run_driver import Fit
from service.jobs.task_runners import InProcessTaskRunner
from service.metrics import Metrics
from service.platform import Platform
from service.serving.catalog import Catalog
from service.serving.engines import InProcessEngines
from service.store import keys
from tests.api.conftest import _Server
from tests.jobs.world import PATIENCE_S, make_orchestrator
from tests.serving.world import add_base, new_world
from tests.training.runs import BASE_KEY, LLAMA, make_base
from training.storage import Storage

ECHO = "echo-base"
TRAINABLE = "tiny"


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


@contextmanager
def training_service(
    home: Path, make_fit: Callable[[Storage, Path], Fit] = LoopFit, base: dict[str, Any] = LLAMA
) -> Iterator[tuple[Platform, OpenAI]]:
    """A service that really trains and answers: an orchestrator ticks beside it, and a tiny base is ready."""
    with (
        live_service(home, engine="native") as (platform, url, secret),
        ticking(platform, make_fit(platform.storage, home / "scratch")),
        sync_client(url, secret) as client,
    ):
        source = Storage(str(home / "source"))
        make_base(source, base)
        client.post("/bases", body={"id": TRAINABLE, "source": source.path(BASE_KEY)}, cast_to=dict[str, Any])
        wait_for(lambda: client.get(f"/bases/{TRAINABLE}", cast_to=dict[str, Any])["status"] == "ready")
        yield platform, client


@contextmanager
def ticking(platform: Platform, fit: Fit) -> Iterator[None]:
    """An orchestrator at work beside a service; its runs are `fit`'s."""
    settings, db, storage = platform.settings, platform.db, platform.storage
    launcher, runner = InProcessLauncher(settings, db, storage, fit, 1), InProcessTaskRunner(settings, db, storage)
    orchestrator, stop = make_orchestrator(settings, db, launcher, runner), threading.Event()

    def tick() -> None:
        while not stop.wait(0.02):
            orchestrator.tick()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(PATIENCE_S)
        launcher.join(PATIENCE_S)
        runner.join(PATIENCE_S)


def wait_for(is_so: Callable[[], bool]) -> None:
    """Poll until it is so."""
    pause, give_up_at = threading.Event(), time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < give_up_at, "it did not happen"
        pause.wait(0.05)


def sync_client(url: str, secret: str) -> OpenAI:
    """The real client; it does not retry, so that tests see the first answer."""
    return OpenAI(base_url=url, api_key=secret, max_retries=0)


def async_client(url: str, secret: str) -> AsyncOpenAI:
    """The real asynchronous client."""
    return AsyncOpenAI(base_url=url, api_key=secret, max_retries=0)
