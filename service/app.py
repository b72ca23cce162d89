"""Builds everything once: the parts of a process, the FastAPI application, and the Serve deployment around it.

Imports neither torch nor Ray at import time; a gateway never loads torch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from service.api import (
    aliases,
    bases,
    chat,
    classify,
    completions,
    decisions,
    embeddings,
    files,
    fine_tuning,
    health,
    keys,
    models,
    validate_job,
)
from service.api.errors import install_error_handlers
from service.api.middleware import install_middleware
from service.platform import Platform
from service.settings import Settings
from service.store import instance
from service.store.database import Database
from training.storage import Storage

if TYPE_CHECKING:
    from ray import serve

ROUTERS = (
    *(files, fine_tuning, validate_job, models, bases, aliases, keys, health),
    *(chat, completions, classify, decisions, embeddings),
)


def build_app(platform: Platform, *, adds_request_id: bool = True) -> FastAPI:
    """The HTTP application over the given parts. Behind Serve, which adds the request id itself, it must not."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with platform.metrics.pushing():
            yield

    app = FastAPI(title="Tunesmith", version="1", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.platform = platform
    for module in ROUTERS:
        app.include_router(module.router)
    install_error_handlers(app)
    install_middleware(app, adds_request_id=adds_request_id)
    return app


def gateway_app(settings: Settings, instance_id: str) -> serve.Application:
    """The Serve application of the gateways, to be run under `naming.gateway_app_name`."""
    from ray import serve

    deployment = serve.deployment(serve.ingress()(Gateway))
    return deployment.options(  # type: ignore[attr-defined]  # Serve types its own decorator as a plain function
        name="Gateway",
        num_replicas=settings.num_gateways,
        max_ongoing_requests=10_000,  # streams are cheap here; the engines' bounded queues push back
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        logging_config={"enable_access_log": False},  # RequestContext logs every request
        ray_actor_options={"num_cpus": settings.gateway_num_cpus, "resources": settings.pin_resources},
    ).bind(settings.model_dump(), instance_id)


class Gateway:
    """One gateway replica. Settings come by value: a replica never reads its environment."""

    def __init__(self, settings: dict[str, Any], instance_id: str) -> None:
        from service.logs import configure_logging

        self.settings = Settings(**settings)
        configure_logging(self.settings.log_level)
        self.platform = ray_platform(self.settings, instance_id)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the constructor is done."""
        return build_app(self.platform, adds_request_id=False)

    def check_health(self) -> None:
        """Serve's periodic call; also brings back an orchestrator that is gone."""
        from service.jobs.orchestrator_actor import ensure_orchestrator

        ensure_orchestrator(self.settings, self.platform.instance_id)


def ray_platform(settings: Settings, instance_id: str) -> Platform:
    """The parts of a gateway process on a Ray cluster."""
    from service.jobs.orchestrator_actor import hub_client
    from service.metrics import Metrics
    from service.serving.catalog import Catalog
    from service.serving.engines import RayEngines

    db = Database(settings.resolved_database_url)
    return Platform(
        settings=settings,
        instance_id=instance_id,
        db=db,
        storage=Storage(settings.resolved_storage_url),
        catalog=Catalog(db),
        engines=RayEngines(instance_id),
        metrics=Metrics(hub_client(instance_id)),
    )


def read_instance_id(db: Database) -> str:
    """The identity of this Tunesmith, made at its first start."""
    with db.write() as tx:
        return instance.get_or_create(tx)
