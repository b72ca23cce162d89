"""The orchestrator as a Ray actor: named, detached, restarted for ever, at work from its constructor on.

It also holds the hub of all processes' metrics, because it is the one actor that everybody can find.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING, Any

from service.jobs import run_actor
from service.jobs.orchestrator import Orchestrator
from service.metrics import ActorHub, MetricsHub, Snapshot
from service.settings import Settings
from service.store.database import Database

if TYPE_CHECKING:
    from ray.actor import ActorHandle

log = logging.getLogger(__name__)


class OrchestratorActor:
    """Ticks in a thread of its own, so that a restarted one works without being called."""

    def __init__(self, settings: Settings, instance_id: str) -> None:
        from service.jobs.launchers import RayLauncher
        from service.jobs.task_runners import RayTaskRunner
        from service.logs import configure_logging
        from service.serving.fleet import RayFleet

        configure_logging(settings.log_level)
        self._settings, self._instance_id = settings, instance_id
        self._hub = MetricsHub()
        self._stop = threading.Event()
        self._db = Database(settings.resolved_database_url)
        self._launcher = RayLauncher(settings, instance_id)
        self._runner = RayTaskRunner(settings, settings.pin_resources)
        self._fleet = RayFleet(settings, instance_id, self._db)
        self._orchestrator = self._build()
        threading.Thread(target=self._work, name="ticks", daemon=True).start()

    def ping(self) -> str:
        """Answers when the constructor is done."""
        return self._instance_id

    def drain(self) -> bool:
        """Take nothing new, have runs checkpoint and go back to the queue; whether all did within the grace."""
        return self._orchestrator.drain(self._settings.stop_grace_s)

    def push_metrics(self, process_id: str, snapshot: Snapshot) -> None:
        """For `ActorHub`."""
        self._hub.push_metrics(process_id, snapshot)

    def read_metrics(self) -> Snapshot:
        """For `ActorHub`."""
        return self._hub.read_metrics()

    def _build(self) -> Orchestrator:
        import ray

        # Ray keeps one actor of this name per cluster, so a restarted one may take its own lease back at once.
        holder = f"{actor_name(self._instance_id)}@{ray.get_runtime_context().gcs_address}"
        return Orchestrator(self._settings, self._db, self._launcher, self._runner, self._fleet, holder)

    def _work(self) -> None:
        """An orchestrator that lost its lease stops for good; a fresh one waits for the lease like any other."""
        while not self._stop.is_set():
            self._orchestrator.run(self._stop)
            self._stop.wait(1.0)
            self._orchestrator = self._build()


def actor_name(instance_id: str) -> str:
    """Ray name of the orchestrator."""
    return f"tunesmith-{instance_id}-orchestrator"


def ensure_orchestrator(settings: Settings, instance_id: str) -> ActorHandle:
    """The orchestrator, created if it is absent. Several callers at once get the same one."""
    import ray

    found = find_orchestrator(instance_id)
    if found is not None:
        return found
    options = {
        "name": actor_name(instance_id),
        "namespace": run_actor.namespace(instance_id),
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 16,
        "resources": settings.pin_resources,
    }
    actor: ActorHandle = ray.remote(OrchestratorActor).options(**options).remote(settings, instance_id)  # type: ignore[assignment]
    return actor


def find_orchestrator(instance_id: str) -> ActorHandle | None:
    """The orchestrator if there is one."""
    import ray

    try:
        return ray.get_actor(actor_name(instance_id), namespace=run_actor.namespace(instance_id))
    except ValueError:  # Ray's way to say that there is no such actor
        return None


def hub_client(instance_id: str) -> ActorHub:
    """The way from any process to the metrics hub."""

    async def get_actor() -> Any:
        actor = await asyncio.to_thread(find_orchestrator, instance_id)
        if actor is None:
            raise LookupError("the orchestrator is away")
        return actor

    return ActorHub(get_actor)
