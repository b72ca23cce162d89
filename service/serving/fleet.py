"""Which engine apps should run, and how Serve is brought there without anybody waiting for it.

One app per ready base (its adapters live inside) and one per full fine-tuned model; also one per fine-tuned classifier
or embedding model, even if it is an adapter. A full model starts with one replica and goes to zero after `FULL_IDLE_S`
without requests; a full *checkpoint* starts at zero: its first request waits for a replica (2–15 s for small models),
and it costs nothing until then. Apps that are not this Tunesmith's are never touched.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from service.serving.catalog import base_deployable, own_deployable
from service.serving.messages import Deployable
from service.serving.naming import ENGINE_DEPLOYMENT, ROOT_DEPLOYMENT, app_name, app_prefix, own_prefix
from service.settings import Settings
from service.store import bases, catalog, models
from service.store.database import Database

if TYPE_CHECKING:
    from ray import serve

log = logging.getLogger(__name__)

FULL_IDLE_S = 600.0  # a full model's last replica goes after so long without a request
CHECKPOINT_IDLE_S = 60.0
MAX_STREAM_S = 3600.0  # a deleted app's replicas finish their streams; none is cut before this
CHECK_INTERVAL_S = 15.0  # without a change of the catalog, Serve is compared with what is wanted this often
REDEPLOY_AFTER_S = 30.0  # an app that failed to deploy is tried again no sooner


@dataclass(frozen=True, slots=True)
class App:
    """A Serve app that should run."""

    name: str
    deployable: Deployable
    min_replicas: int
    initial_replicas: int
    max_replicas: int
    idle_s: float


def wanted(tx: Session, settings: Settings, instance_id: str) -> list[App]:
    """The apps that the registry asks for."""
    ready = bases.all_ready(tx)
    apps = [_base_app(settings, instance_id, base_deployable(base)) for base in ready]
    by_id = {base.id: base for base in ready}
    for model in models.all_live(tx):
        base = by_id.get(model.base_id)
        if base is None or base.content_hash != model.base_content_hash:
            continue
        if (own := own_deployable(model, base)) is not None:
            apps.append(_full_app(settings, instance_id, own, model.is_checkpoint))
    return apps


def _base_app(settings: Settings, instance_id: str, deployable: Deployable) -> App:
    least = min(settings.engine_min_replicas, settings.engine_max_replicas)
    name = app_name(instance_id, deployable)
    return App(name, deployable, least, least, settings.engine_max_replicas, FULL_IDLE_S)


def _full_app(settings: Settings, instance_id: str, deployable: Deployable, is_checkpoint: bool) -> App:
    return App(
        app_name(instance_id, deployable),
        deployable,
        min_replicas=0,
        initial_replicas=0 if is_checkpoint else 1,
        max_replicas=settings.engine_max_replicas,
        idle_s=CHECKPOINT_IDLE_S if is_checkpoint else FULL_IDLE_S,
    )


class InProcessFleet:
    """The double for one process: its engines start on their first request, so there is nothing to do."""

    def reconcile(self) -> None:
        """Nothing to bring about."""

    def close(self) -> None:
        """Nothing to end."""


class RayFleet:
    """Brings Serve's apps in line with the registry, in a thread of its own: `reconcile` returns at once."""

    def __init__(self, settings: Settings, instance_id: str, db: Database) -> None:
        self._settings = settings
        self._db = db
        self._instance_id = instance_id
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fleet")
        self._round: Future[None] | None = None
        self._settled: tuple[int, float] | None = None  # catalog version that Serve was found to match, and when
        self._deployed_at: dict[str, float] = {}

    def reconcile(self) -> None:
        """Start a round unless one is at work or nothing has changed."""
        if self._round is None or self._round.done():
            self._round = self._worker.submit(self._reconcile)

    def close(self) -> None:
        """Let a round that is at work finish, and start no other."""
        self._worker.shutdown(wait=True)

    def _reconcile(self) -> None:
        try:
            with self._db.read() as tx:
                version = catalog.version(tx)
                if self._is_settled(version):
                    return
                apps = wanted(tx, self._settings, self._instance_id)
            self._settled = (version, time.monotonic()) if self._apply(apps) else None
        except Exception:  # a process edge: the next round tries again, whatever Serve or the database had
            log.exception("the deployments could not be brought in line")

    def _is_settled(self, version: int) -> bool:
        if self._settled is None or self._settled[0] != version:
            return False
        return time.monotonic() - self._settled[1] < CHECK_INTERVAL_S

    def _apply(self, apps: list[App]) -> bool:
        """Start what is missing, delete what is not wanted; whether nothing was left to do."""
        from ray import serve
        from ray.serve.schema import ApplicationStatus

        running = {
            name: app.status
            for name, app in serve.status().applications.items()
            if name.startswith(app_prefix(self._instance_id))
        }
        names = {app.name for app in apps}
        to_start = [app for app in apps if self._should_start(app.name, running.get(app.name))]
        if to_start:
            self._start(to_start)
        for name, status in running.items():
            if name not in names and status != ApplicationStatus.DELETING:
                log.info("deleting the app %s once its streams have ended", name)
                serve.delete(name, _blocking=False)
        return names == running.keys() and not to_start

    def _should_start(self, name: str, status: str | None) -> bool:
        from ray.serve.schema import ApplicationStatus

        if status is None:
            return True
        has_failed = status == ApplicationStatus.DEPLOY_FAILED
        return has_failed and time.monotonic() - self._deployed_at.get(name, 0.0) > REDEPLOY_AFTER_S

    def _start(self, apps: list[App]) -> None:
        from ray import serve

        for app in apps:
            log.info("starting the app %s for %s", app.name, app.deployable.id)
            self._deployed_at[app.name] = time.monotonic()
        targets = [
            serve.RunTarget(engine_app(self._settings, self._instance_id, app), name=app.name, route_prefix=None)
            for app in apps
        ]
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def own_app_names(instance_id: str) -> list[str]:
    """Every app of this Tunesmith that Serve knows, the gateways' included."""
    from ray import serve

    return [name for name in serve.status().applications if name.startswith(own_prefix(instance_id))]


def engine_app(settings: Settings, instance_id: str, app: App) -> serve.Application:
    """The Serve application: a root without process or port, and the engine as its child."""
    from ray import serve

    from service.serving.replica import AppRoot, EngineReplica

    engine = serve.deployment(EngineReplica).options(  # type: ignore[attr-defined]
        name=ENGINE_DEPLOYMENT,
        # The engine's own bounded queue says when it is full (429); Serve's bound is only there not to be met first.
        max_ongoing_requests=2 * (settings.max_batch_size + settings.max_waiting),
        graceful_shutdown_timeout_s=MAX_STREAM_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        health_check_timeout_s=30,
        logging_config={"enable_access_log": False},  # the gateways log every request already
        ray_actor_options={
            "num_cpus": settings.engine_num_cpus,
            "num_gpus": settings.engine_num_gpus,
            "resources": settings.pin_resources,
        },
        **_scaling(settings, app),
    )
    root = serve.deployment(AppRoot).options(  # type: ignore[attr-defined]
        name=ROOT_DEPLOYMENT,
        ray_actor_options={"num_cpus": 0, "resources": settings.pin_resources},
        autoscaling_config={"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1},
        graceful_shutdown_timeout_s=1,
    )
    return root.bind(engine.bind(settings.model_dump(), instance_id, app.deployable))


def _scaling(settings: Settings, app: App) -> dict[str, object]:
    if app.min_replicas == app.max_replicas:
        return {"num_replicas": app.max_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": app.min_replicas,
            "initial_replicas": app.initial_replicas,
            "max_replicas": app.max_replicas,
            "target_ongoing_requests": settings.max_batch_size,
            "upscale_delay_s": 2,
            "downscale_delay_s": app.idle_s,
        }
    }
