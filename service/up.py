"""`tunesmith up`: start or join a cluster, run gateways and orchestrator, and take all down in order.

Owns the home (lock, admin key, migrations) and the life of everything this Tunesmith runs on Ray. On a joined cluster
it touches only what bears its instance id.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx2
import ray
from ray import serve
from rich.console import Console

from service import haproxy
from service.app import gateway_app, read_instance_id
from service.jobs.orchestrator_actor import ensure_orchestrator, find_orchestrator
from service.serving.fleet import own_app_names
from service.serving.naming import gateway_app_name
from service.settings import Settings, tune_serve
from service.store import bases, keys, migrate, tasks
from service.store.database import Database
from service.store.instance import DEFAULT_PROJECT
from service.trackers.chosen import missing_extras

OBJECT_STORE_BYTES = 512 << 20  # weights and files travel through storage, so Ray's object store stays small
READY_TIMEOUT_S = 120.0


class UpError(Exception):
    """`up` cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Running:
    """A service that answers."""

    url: str  # base_url for an OpenAI client, ends in /v1
    admin_key: str
    settings: Settings
    instance_id: str
    dashboard_url: str  # Ray's own; empty where the cluster has none


def main(settings: Settings) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    console = Console()
    with running_service(settings, stop) as service:
        console.print(f"[bold green]Tunesmith is ready[/] at {service.url}")
        console.print(f"The admin key lies in {settings.admin_key_file}. Press Ctrl-C to stop.")
        if service.dashboard_url:
            console.print(f"Ray's dashboard: {service.dashboard_url}")
        while not stop.wait(1.0):
            pass
        console.print("Stopping: open streams finish, running jobs write a checkpoint and go back to the queue …")
    console.print("Stopped. Everything is kept in " + str(settings.home_dir))


@contextmanager
def running_service(settings: Settings, stop: threading.Event | None = None) -> Iterator[Running]:
    """The whole service, up and ready within the block and down after it. `stop` ends the wait for readiness early."""
    with ExitStack() as stack:
        stack.enter_context(_locked_home(settings))
        instance_id, admin_key = _prepare_state(settings)
        haproxy.end_orphan(settings)
        _check_port(settings)
        dashboard_url = stack.enter_context(_cluster(settings))
        stack.callback(_take_down, settings, instance_id)
        _start_serve(settings)
        _refuse_second_node(settings)
        ensure_orchestrator(settings, instance_id)
        url = _run_gateways(settings, instance_id)
        _await_ready(url, stop or threading.Event())
        (settings.home_dir / "up.json").write_text(json.dumps({"pid": os.getpid(), "url": url + "/v1"}))
        yield Running(url + "/v1", admin_key, settings, instance_id, dashboard_url)


def serve_app(settings: dict[str, Any]) -> serve.Application:
    """The builder for Serve configs (`deploy/serve.yaml`): the gateways on a cluster that others start and stop."""
    chosen = Settings(**settings)
    chosen.home_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    instance_id, _ = _prepare_state(chosen)
    return gateway_app(chosen, instance_id)


@contextmanager
def _locked_home(settings: Settings) -> Iterator[None]:
    """Hold the home's lock, which the kernel frees however this process ends."""
    home = settings.home_dir
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock: IO[str]
    with (home / "up.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpError(f"Tunesmith runs already on {home}{_where_it_answers(home)}. Stop it first.") from None
        try:
            yield
        finally:
            (home / "up.json").unlink(missing_ok=True)


def _where_it_answers(home: Path) -> str:
    try:
        state = json.loads((home / "up.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return " (it is starting or stopping)"
    return f" and answers at {state['url']} (process {state['pid']})"


def _prepare_state(settings: Settings) -> tuple[str, str]:
    """Migrate the database, make the admin key valid, register the bases of the settings."""
    if missing := missing_extras(settings):
        raise UpError(" ".join(missing))
    db = Database(settings.resolved_database_url)
    try:
        migrate.upgrade(db)
        instance_id = read_instance_id(db)
        admin_key = _admin_key(settings.admin_key_file)
        with db.write() as tx:
            keys.put_admin(tx, admin_key)
            for base_id, source, revision in settings.parsed_bases():
                if (known := bases.find(tx, base_id)) is None or known.status == "error":
                    bases.add(
                        tx, project_id=DEFAULT_PROJECT, created_by=None, id=base_id, source=source, revision=revision
                    )
                    tasks.add(tx, "import_base", {"base_id": base_id})
    except migrate.SchemaMismatch as error:
        raise UpError(str(error)) from None
    finally:
        db.close()
    return instance_id, admin_key


def _admin_key(path: Path) -> str:
    """The key in the file; made at the first start, readable by its owner only from the first byte on."""
    if not path.exists() or not path.read_text().strip():
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(keys.new_secret() + "\n")
    return path.read_text().strip()


def _check_port(settings: Settings) -> None:
    """A taken port is found before anything is started; on a joined cluster it may be Serve's own, and rightly so."""
    if settings.ray_address:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except OSError as error:
        raise UpError(
            f"Cannot listen on {settings.host}:{settings.port} ({error.strerror}). "
            "Choose another address with --host and --port."
        ) from None


@contextmanager
def _cluster(settings: Settings) -> Iterator[str]:
    """Start or join Ray; yields its dashboard's address. The dashboard stays on: without it Ray never frees the
    resources of a killed training run (2.60)."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its news are not the user's
    if not settings.ray_address:
        tune_serve()
        context = ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=settings.log_level == "debug",
            logging_level=logging.ERROR,
        )
    else:
        try:
            context = ray.init(address=settings.ray_address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise UpError(f"No Ray cluster answers at {settings.ray_address}: {error}") from None
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
        ray.shutdown()
        haproxy.end_orphan(settings)


def _refuse_second_node(settings: Settings) -> None:
    """State on a local disk and processes on several nodes do not go together."""
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    if settings.is_single_node and num_nodes > 1:
        raise UpError(
            f"The cluster has {num_nodes} nodes, but the state lies on this machine's disk. Set TUNESMITH_DATABASE_URL "
            "to a PostgreSQL URL and TUNESMITH_STORAGE_URL to a shared one such as s3://bucket/folder."
        )


def _start_serve(settings: Settings) -> None:
    """Start Serve unless the joined cluster runs it already, which then keeps its own HTTP options."""
    location = "HeadOnly" if settings.is_single_node else "EveryNode"
    options = {"host": settings.host, "port": settings.port}
    controller_options = haproxy.controller_options(settings)
    try:
        serve.start(proxy_location=location, http_options=options, controller_options=controller_options)
    except ray.exceptions.RayError as error:
        raise UpError(f"Ray Serve could not start: {str(error).strip().splitlines()[-1]}") from None


def _run_gateways(settings: Settings, instance_id: str) -> str:
    """Deploy the gateways; returns the URL they are mounted at."""
    name = gateway_app_name(instance_id)
    client = serve.context._connect()  # Serve's public API tells neither routes nor the HTTP options in force
    apps = client.get_serve_details()["applications"]
    taken = {app["route_prefix"] for other, app in apps.items() if other != name}
    prefix = settings.route_prefix
    if prefix in taken:
        prefix = f"/tunesmith-{instance_id}"  # two Tunesmiths, or another Serve app, on one cluster
    serve.run(gateway_app(settings, instance_id), name=name, route_prefix=prefix)
    http = client.http_config
    host = "127.0.0.1" if http.host in ("0.0.0.0", "::", None) else http.host
    return f"http://{host}:{http.port}{prefix.rstrip('/')}"


def _await_ready(url: str, stop: threading.Event) -> None:
    """Until the gateway answers through the edge."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not stop.is_set():
        try:
            if httpx2.get(url + "/readyz", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            pass  # the edge has no route yet
        if time.monotonic() > deadline:
            raise UpError(f"The gateway does not answer at {url}; see the logs of Ray in /tmp/ray/session_latest/logs.")
        stop.wait(0.1)


def _take_down(settings: Settings, instance_id: str) -> None:
    """Drain: jobs are requeued while open streams finish; then everything of ours goes."""
    orchestrator = find_orchestrator(instance_id)
    drained = orchestrator.drain.remote() if orchestrator is not None else None
    if gateway_app_name(instance_id) in serve.status().applications:
        serve.delete(gateway_app_name(instance_id))
    if drained is not None:
        try:
            ray.get(drained, timeout=settings.stop_grace_s + 10)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
            Console(stderr=True).print("A running job did not stop in time; it continues from its last checkpoint.")
        ray.kill(orchestrator)
    if settings.ray_address:
        for name in own_app_names(instance_id):
            serve.delete(name)
