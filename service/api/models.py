"""/v1/models: what can be called. Bases that are ready, the project's fine-tuned models, and its aliases."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session

from service.api.deps import ModelsDep, ModelsReadDep, PlatformDep
from service.api.paging import refuse_unknown_query
from service.api.views import Json, alias_as_model_json, base_as_model_json, model_json
from service.errors import InvalidRequest
from service.jobs.states import JobState
from service.store import aliases, bases, checkpoints, jobs, models, tasks
from service.store.tables import Model

router = APIRouter(prefix="/v1/models", tags=["models"])


def _callable_models(tx: Session, project_id: str, organization: str) -> list[Json]:
    ready = {base.id: base for base in bases.all_ready(tx)}
    found = {base.id: base_as_model_json(base) for base in ready.values()}
    for model in models.all_live(tx):
        if model.project_id == project_id and model.base_id in ready:
            found[model.id] = model_json(model, ready[model.base_id].max_context, organization)
    moving = [
        alias_as_model_json(alias, found[alias[1][0].model_id], organization)
        for alias in aliases.all_current(tx, project_id)
        if alias[1][0].model_id in found and alias[0].name not in found
    ]
    return [*found.values(), *moving]


@router.get("")
def list_models(request: Request, platform: PlatformDep, who: ModelsReadDep) -> dict[str, Any]:
    """Everything that a request may name as its model."""
    refuse_unknown_query(request)
    with platform.db.read() as tx:
        found = _callable_models(tx, who.project_id, platform.settings.organization)
    return {"object": "list", "data": found}


@router.get("/{model_id:path}")
def retrieve(model_id: str, platform: PlatformDep, who: ModelsReadDep) -> dict[str, Any]:
    """One base, fine-tuned model, checkpoint or alias."""
    organization = platform.settings.organization
    with platform.db.read() as tx:
        base = bases.find(tx, model_id)
        if base is not None and base.status == "ready":
            return base_as_model_json(base)
        alias = aliases.current(tx, who.project_id, model_id)
        target_id = alias[1][0].model_id if alias is not None else model_id
        target_base = bases.find(tx, target_id) if alias is not None else None
        if target_base is not None:
            target = base_as_model_json(target_base)
        else:
            model = models.get(tx, who.project_id, target_id)
            own_base = bases.find(tx, model.base_id)
            target = model_json(model, own_base.max_context if own_base else None, organization)
    return target if alias is None else alias_as_model_json(alias, target, organization)


@router.delete("/{model_id:path}")
def delete(model_id: str, platform: PlatformDep, who: ModelsDep) -> dict[str, Any]:
    """Take a fine-tuned model out of service. Bases and aliases have their own paths."""
    with platform.db.write() as tx:
        if bases.find(tx, model_id) is not None:
            raise InvalidRequest(f"'{model_id}' is a base model; it is removed by DELETE /v1/bases.", param="model")
        if models.find(tx, who.project_id, model_id) is None and aliases.current(tx, who.project_id, model_id):
            raise InvalidRequest(f"'{model_id}' is an alias; it is removed by DELETE /v1/aliases.", param="model")
        _delete_bytes(tx, models.delete(tx, who.project_id, model_id))
    return {"id": model_id, "object": "model", "deleted": True}


def _delete_bytes(tx: Session, model: Model) -> None:
    """Queue the removal of what nothing reads any more; a job that is not over may still resume from its folders."""
    if model.job_id is not None and not JobState(jobs.by_id(tx, model.job_id).state).is_terminal:
        return
    if model.is_checkpoint and model.job_id is not None:
        checkpoints.mark_deleted(tx, model.job_id, model.storage_key)
    tasks.add(tx, "delete_folder", {"key": model.storage_key})
