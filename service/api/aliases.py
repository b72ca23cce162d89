"""/v1/aliases: names that move. A move is one transaction; requests accepted after it returned see the new model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session

from service.api.deps import ModelsDep, PlatformDep
from service.api.paging import list_page, refuse_unknown_query
from service.api.schemas import PutAlias, check_alias_name
from service.api.views import alias_json
from service.auth import Caller
from service.errors import InvalidRequest
from service.store import aliases, bases, models

router = APIRouter(prefix="/v1/aliases", tags=["aliases"])

MAX_HISTORY = 20


@router.put("/{name:path}")
def put(name: str, body: PutAlias, platform: PlatformDep, who: ModelsDep) -> dict[str, Any]:
    """Point the name to a model, whether it existed or not."""
    try:
        check_alias_name(name)
    except ValueError as error:
        raise InvalidRequest(f"Invalid alias name '{name[:128]}': {error}.", param="name") from None
    with platform.db.write() as tx:
        if bases.find(tx, name) is not None:
            raise InvalidRequest(f"Invalid alias name '{name}': a base model is called that.", param="name")
        _check_target(tx, who, body.model)
        aliases.put(tx, project_id=who.project_id, name=name, model_id=body.model, created_by=who.key_id)
        return alias_json(aliases.get(tx, who.project_id, name))


def _check_target(tx: Session, who: Caller, model_id: str) -> None:
    base = bases.find(tx, model_id)
    if base is not None:
        if base.status != "ready":
            raise InvalidRequest(f"Invalid value for 'model': the base '{model_id}' is {base.status}.", param="model")
        return
    if models.find(tx, who.project_id, model_id) is None and aliases.current(tx, who.project_id, model_id):
        message = f"Invalid value for 'model': '{model_id}' is an alias; aliases point to models."
        raise InvalidRequest(message, param="model")
    models.get(tx, who.project_id, model_id)


@router.get("")
def list_aliases(request: Request, platform: PlatformDep, who: ModelsDep) -> dict[str, Any]:
    """All aliases of the project, by name."""
    refuse_unknown_query(request)
    with platform.db.read() as tx:
        return list_page([alias_json(alias) for alias in aliases.all_current(tx, who.project_id)], has_more=False)


@router.get("/{name:path}")
def retrieve(name: str, platform: PlatformDep, who: ModelsDep) -> dict[str, Any]:
    """One alias with its newest revisions."""
    with platform.db.read() as tx:
        alias = aliases.get(tx, who.project_id, name)
        history = aliases.history(tx, who.project_id, name, MAX_HISTORY)
    return {**alias_json(alias), "history": [alias_json(revision) for revision in history]}


@router.delete("/{name:path}")
def delete(name: str, platform: PlatformDep, who: ModelsDep) -> dict[str, Any]:
    """End an alias; its history stays."""
    with platform.db.write() as tx:
        aliases.delete(tx, who.project_id, name, who.key_id)
    return {"id": name, "object": "alias", "deleted": True}
