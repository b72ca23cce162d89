"""/v1/files: upload, list, look at, download, delete."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect

from service.api.deps import FilesDep, PlatformDep
from service.api.paging import After, list_page, refuse_unknown_query
from service.auth import Caller
from service.errors import InvalidRequest, NotFound
from service.files.filenames import content_disposition
from service.files.upload import Upload, receive
from service.files.validation import VALIDATED_PURPOSE
from service.platform import Platform
from service.store import files, tasks
from service.store.database import now
from service.store.paging import Page, page
from service.store.tables import File

router = APIRouter()

MAX_LIMIT = 10_000
CHUNK_BYTES = 1 << 20


@router.post("/v1/files")
async def create_file(request: Request, platform: PlatformDep, caller: FilesDep) -> dict[str, Any]:
    """Stream the upload to storage; the row, written last, makes it count and queues its validation."""
    limit = platform.settings.max_file_bytes
    try:
        upload = await receive(request.headers.get("content-type"), request.stream(), platform.storage, limit)
    except ClientDisconnect:  # nobody is left to read this; it keeps the log free of a fault that is not ours
        raise InvalidRequest("The connection was closed before the upload was complete.") from None
    return await run_in_threadpool(_record, platform, caller, upload)


def _record(platform: Platform, caller: Caller, upload: Upload) -> dict[str, Any]:
    try:
        with platform.db.write() as tx:
            row = _insert(tx, caller, upload)
        return file_object(row)
    except BaseException:  # whatever stopped the row: bytes without one are removed, and the error goes on
        with platform.db.read() as tx:
            committed = files.by_id(tx, upload.file_id) is not None  # a lost connection may hide a commit
        if not committed:
            platform.storage.delete(upload.storage_key)
        raise


def _insert(tx: Session, caller: Caller, upload: Upload) -> File:
    is_validated = upload.purpose == VALIDATED_PURPOSE
    row = files.create(
        tx,
        project_id=caller.project_id,
        created_by=caller.key_id,
        id=upload.file_id,
        filename=upload.filename,
        purpose=upload.purpose,
        size_bytes=upload.size_bytes,
        sha256=upload.sha256,
        storage_key=upload.storage_key,
        status="uploaded" if is_validated else "processed",
        expires_at=None if upload.expires_after_s is None else float(int(now()) + upload.expires_after_s),
    )
    if is_validated:
        tasks.add(tx, "validate_file", {"file_id": row.id})
    return row


@router.get("/v1/files")
def list_files(
    request: Request,
    platform: PlatformDep,
    caller: FilesDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = MAX_LIMIT,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """The project's files, newest first by default."""
    refuse_unknown_query(request, "after", "limit", "order", "purpose")
    with platform.db.read() as tx:
        wanted = Page(after=after, limit=limit, order=order)
        rows, has_more = page(tx, File, wanted, *files.in_project(caller.project_id, purpose))
    return list_page([file_object(row) for row in rows], has_more)


@router.get("/v1/files/{file_id}")
def retrieve_file(file_id: str, platform: PlatformDep, caller: FilesDep) -> dict[str, Any]:
    """One file with the outcome of its validation."""
    with platform.db.read() as tx:
        return file_object(files.get(tx, caller.project_id, file_id))


@router.get("/v1/files/{file_id}/content")
def file_content(file_id: str, platform: PlatformDep, caller: FilesDep) -> StreamingResponse:
    """The bytes as they were uploaded."""
    with platform.db.read() as tx:
        row = files.get(tx, caller.project_id, file_id)
    try:
        source = platform.storage.open_read(row.storage_key)
    except FileNotFoundError:  # deleted between the two lines above
        raise NotFound(f"No such File object: {file_id}", param="id") from None
    headers = {"content-disposition": content_disposition(row.filename), "content-length": str(row.size_bytes)}
    return StreamingResponse(_chunks(source), media_type="application/octet-stream", headers=headers)


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    with source:
        while chunk := source.read(CHUNK_BYTES):
            yield chunk


@router.delete("/v1/files/{file_id}")
def delete_file(file_id: str, platform: PlatformDep, caller: FilesDep) -> dict[str, Any]:
    """Delete a file that no unfinished job needs; its bytes are removed by a task."""
    with platform.db.write() as tx:
        row = files.delete(tx, caller.project_id, file_id)
        tasks.add(tx, "delete_folder", {"key": row.storage_key})
    return {"id": row.id, "object": "file", "deleted": True}


def file_object(row: File) -> dict[str, Any]:
    """OpenAI's FileObject, with our sha256 and validation report beside it."""
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.size_bytes,
        "created_at": int(row.created_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": row.status,
        "status_details": row.status_details,
        "expires_at": None if row.expires_at is None else int(row.expires_at),
        "sha256": row.sha256,
        "report": row.report,
    }
