"""/healthz, /readyz, /metrics: for machines that watch. The first two answer without a key and tell nothing private."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from service.api.deps import PlatformDep, caller
from service.auth import Caller
from service.metrics import database_metrics
from service.platform import Platform
from service.store import leases, migrate

log = logging.getLogger(__name__)

router = APIRouter(tags=["health"])

ORCHESTRATOR_LEASE = "orchestrator"


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@router.get("/readyz", response_model=None)
def readyz(platform: PlatformDep) -> Any:
    """Whether requests will be served: database there and of this version, orchestrator at work."""
    reasons = _reasons(platform)
    body = {"status": "unavailable" if reasons else "ok", "reasons": reasons}
    return JSONResponse(body, status_code=503 if reasons else 200)


def _reasons(platform: Platform) -> list[str]:
    try:
        migrate.check(platform.db)
        with platform.db.read() as tx:
            return [] if leases.is_alive(tx, ORCHESTRATOR_LEASE) else ["the orchestrator is not running"]
    except migrate.SchemaMismatch:
        return ["the database has the schema of another version"]
    except SQLAlchemyError:
        log.warning("readiness: the database did not answer", exc_info=True)
        return ["the database is unreachable"]


@router.get("/metrics")
async def metrics(platform: PlatformDep, _who: Annotated[Caller, Depends(caller("models"))]) -> Response:
    """Prometheus text: the same whichever gateway answers."""
    families = await run_in_threadpool(_database_families, platform)
    return Response(await platform.metrics.render(families), media_type=CONTENT_TYPE_LATEST)


def _database_families(platform: Platform) -> list[Any]:
    with platform.db.read() as tx:
        return database_metrics(tx)
