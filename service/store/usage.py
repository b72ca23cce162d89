"""Tokens per key, model and day."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import update
from sqlalchemy.orm import Session

from service.store.tables import Usage


def add(
    tx: Session, *, key_id: str, project_id: str, model_id: str, prompt_tokens: int, completion_tokens: int
) -> None:
    """Add one request to today's row."""
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    changed = tx.execute(
        update(Usage)
        .where(Usage.key_id == key_id, Usage.model_id == model_id, Usage.day == day)
        .values(
            num_requests=Usage.num_requests + 1,
            prompt_tokens=Usage.prompt_tokens + prompt_tokens,
            completion_tokens=Usage.completion_tokens + completion_tokens,
        )
    )
    if changed.rowcount == 0:  # type: ignore[attr-defined]
        row = Usage(key_id=key_id, model_id=model_id, day=day, project_id=project_id, num_requests=1)
        row.prompt_tokens, row.completion_tokens = prompt_tokens, completion_tokens
        tx.add(row)
        tx.flush()
