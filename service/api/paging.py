"""Lists on the wire: what a list request may ask, and OpenAI's page around the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Query, Request

from service.errors import InvalidRequest

After = Annotated[str | None, Query(min_length=1, max_length=256)]
Limit = Annotated[int, Query(ge=1, le=100)]


def list_page(items: Sequence[Mapping[str, Any]], has_more: bool) -> dict[str, Any]:
    """The superset of fields that OpenAI's page classes read; `has_more` is always there, or clients loop for ever."""
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }


def refuse_unknown_query(request: Request, *known: str) -> None:
    """InvalidRequest for a query parameter that the route would otherwise drop silently; `name[` allows a family."""
    for name in request.query_params:
        family = name.partition("[")[0] + "["
        if name not in known and family not in known:
            raise InvalidRequest(f"Unknown query parameter: '{name}'.", param=name, code="unknown_parameter")
