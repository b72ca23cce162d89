"""Cursor paging over any listable table, by `seq` (times have too little resolution to order by)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from service.errors import NotFound
from service.store.tables import Listable

Row = TypeVar("Row", bound=Listable)


@dataclass(frozen=True)
class Page:
    """What a list request asks for: at most `limit` rows behind the row with id `after`."""

    after: str | None = None
    limit: int = 20
    order: Literal["asc", "desc"] = "desc"


def page(
    tx: Session,
    table: type[Row],
    wanted: Page,
    *where: ColumnElement[bool],
    cursor_in: Sequence[ColumnElement[bool]] = (),
) -> tuple[list[Row], bool]:
    """The rows of one page and whether more follow. An unknown cursor is an error: an empty page would hide it.

    A cursor need not meet `where`, as its row may have been deleted or changed since; `cursor_in` it must.
    """
    query = select(table).where(*where)
    if wanted.after is not None:
        cursor = tx.scalar(select(table.seq).where(table.id == wanted.after, *cursor_in))
        if cursor is None:
            raise NotFound(f"No object with id '{wanted.after}' to continue after.", param="after")
        query = query.where(table.seq > cursor if wanted.order == "asc" else table.seq < cursor)
    query = query.order_by(table.seq.asc() if wanted.order == "asc" else table.seq.desc()).limit(wanted.limit + 1)
    rows = list(tx.scalars(query))
    return rows[: wanted.limit], len(rows) > wanted.limit
