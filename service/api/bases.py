"""/v1/bases: the registry of allowed base models. For administrators: a base is read from a folder or a Hub."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from service.api.deps import AdminDep, PlatformDep
from service.api.paging import After, Limit, list_page, refuse_unknown_query
from service.api.schemas import CreateBase
from service.api.views import base_json
from service.errors import InvalidRequest
from service.store import aliases, bases, tasks
from service.store.paging import Page, page
from service.store.tables import BaseModel

router = APIRouter(prefix="/v1/bases", tags=["bases"])


@router.post("")
def create(body: CreateBase, platform: PlatformDep, who: AdminDep) -> dict[str, Any]:
    """Register a base and import it by a task. Registering the same one again (a retry) answers with its row."""
    with platform.db.write() as tx:
        known = bases.find(tx, body.id)
        if (
            known is not None
            and known.status != "error"
            and (known.source, known.revision)
            == (
                body.source,
                body.revision,
            )
        ):
            return base_json(known)
        if aliases.current(tx, who.project_id, body.id) is not None:
            raise InvalidRequest(f"Invalid value for 'id': an alias is called '{body.id}' already.", param="id")
        base = bases.add(
            tx,
            project_id=who.project_id,
            created_by=who.key_id,
            id=body.id,
            source=body.source,
            revision=body.revision,
        )
        tasks.add(tx, "import_base", {"base_id": base.id})
    return base_json(base)


@router.get("")
def list_bases(
    request: Request, platform: PlatformDep, _who: AdminDep, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    """All bases, newest first, also those that are being prepared or failed."""
    refuse_unknown_query(request, "after", "limit")
    with platform.db.read() as tx:
        rows, has_more = page(tx, BaseModel, Page(after, limit), *bases.live())
    return list_page([base_json(base) for base in rows], has_more)


@router.get("/{base_id:path}")
def retrieve(base_id: str, platform: PlatformDep, _who: AdminDep) -> dict[str, Any]:
    """One base."""
    with platform.db.read() as tx:
        return base_json(bases.get(tx, base_id))


@router.delete("/{base_id:path}")
def delete(base_id: str, platform: PlatformDep, who: AdminDep) -> dict[str, Any]:
    """Remove a base that nothing needs any more."""
    with platform.db.write() as tx:
        for revision, targets in aliases.all_current(tx, who.project_id):
            if any(target.model_id == base_id for target in targets):
                message = f"The alias '{revision.name}' points to this base; move or delete the alias first."
                raise InvalidRequest(message, param="id")
        bases.delete(tx, base_id)
    return {"id": base_id, "object": "base", "deleted": True}
