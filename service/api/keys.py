"""/v1/keys: API keys. The secret is in the answer to the create and nowhere else, ever."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from service.api.deps import AdminDep, PlatformDep
from service.api.paging import After, Limit, list_page, refuse_unknown_query
from service.api.schemas import CreateKey
from service.api.views import key_json
from service.store import keys
from service.store.paging import Page, page
from service.store.tables import Key

router = APIRouter(prefix="/v1/keys", tags=["keys"])

ProjectId = Annotated[str | None, Query(min_length=1, max_length=64)]


@router.post("")
def create(body: CreateKey, platform: PlatformDep, who: AdminDep) -> dict[str, Any]:
    """A new key, by default for the caller's project."""
    with platform.db.write() as tx:
        key, secret = keys.create(
            tx,
            project_id=body.project_id or who.project_id,
            name=body.name,
            scopes=list(dict.fromkeys(body.scopes)),
            created_by=who.key_id,
        )
    return {**key_json(key), "value": secret}


@router.get("")
def list_keys(
    request: Request,
    platform: PlatformDep,
    who: AdminDep,
    after: After = None,
    limit: Limit = 20,
    project_id: ProjectId = None,
) -> dict[str, Any]:
    """Keys that are valid, newest first; of the caller's project or of the one named."""
    refuse_unknown_query(request, "after", "limit", "project_id")
    with platform.db.read() as tx:
        rows, has_more = page(tx, Key, Page(after, limit), *keys.in_project(project_id or who.project_id))
    return list_page([key_json(key) for key in rows], has_more)


@router.delete("/{key_id}")
def revoke(key_id: str, platform: PlatformDep, who: AdminDep, project_id: ProjectId = None) -> dict[str, Any]:
    """Make a key invalid, from the next request on, at every gateway."""
    with platform.db.write() as tx:
        keys.revoke(tx, project_id or who.project_id, key_id)
    return {"id": key_id, "object": "api_key", "deleted": True}
