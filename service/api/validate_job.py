"""POST /v1/fine_tuning/jobs/validate: what a create with the same body would run, without creating anything.

A worker task plans, because a gateway imports no torch and renders no files; the request waits for its answer.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter

from service.api.create_job import build_spec
from service.api.deps import JobsDep, PlatformDep
from service.api.schemas import CreateJob
from service.api.views import plan_json
from service.auth import Caller
from service.errors import InvalidRequest, RateLimited, ServiceError, TooSlow
from service.platform import Platform
from service.store import files, tasks

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

POLL_S = 0.2
MAX_OPEN = 4  # plans in the making; half of the workers' slots, so that jobs are planned meanwhile
KIND = "preview_job"


@router.post("/validate")
async def validate(body: CreateJob, platform: PlatformDep, who: JobsDep) -> dict[str, Any]:
    """The plan, or as a 400 the coded error that the job would end with."""
    if body.sweep is not None:
        raise InvalidRequest(
            "A plan is of one run: leave 'sweep' out here, and set the values to be planned.", param="sweep"
        )
    until = time.monotonic() + platform.settings.validate_timeout_s
    while (task_id := await asyncio.to_thread(_queue, platform, who, body)) is None:  # its files are being checked
        await _pause(until)
    try:
        while (answer := await asyncio.to_thread(_answer, platform, task_id)) is None:
            await _pause(until)
    finally:
        await asyncio.to_thread(_forget, platform, task_id)
    if (error := answer.get("error")) is not None:
        raise InvalidRequest(error["message"], code=error["code"], param=error["param"])
    return plan_json(answer["plan"], body.seed)


async def _pause(until: float) -> None:
    if time.monotonic() > until:
        raise TooSlow(
            "The plan takes longer than a request may wait; its files are large, or the service is busy. Create the "
            "job: it is planned in the same way, and fails with the same error before it is queued.",
            code="validation_timeout",
        )
    await asyncio.sleep(POLL_S)


def _queue(platform: Platform, who: Caller, body: CreateJob) -> str | None:
    """The id of a new task; None while a file is still being checked."""
    with platform.db.write() as tx:
        spec = build_spec(tx, platform, who, body)
        named = [file_id for file_id in (body.training_file, body.validation_file) if file_id is not None]
        if any(files.get(tx, who.project_id, file_id).status == "uploaded" for file_id in named):
            return None
        if tasks.num_open(tx, KIND) >= MAX_OPEN:
            raise RateLimited("Too many plans are being made right now; try again soon.", retry_after_s=2.0)
        return tasks.add(tx, KIND, {"spec": spec.model_dump(mode="json"), "project_id": who.project_id}).id


def _answer(platform: Platform, task_id: str) -> dict[str, Any] | None:
    with platform.db.read() as tx:
        task = tasks.get(tx, task_id)
    if task.state == "failed":
        raise ServiceError(f"The job could not be planned: {task.error}", code="planning_failed")
    return task.answer


def _forget(platform: Platform, task_id: str) -> None:
    with platform.db.write() as tx:
        tasks.drop(tx, task_id)
