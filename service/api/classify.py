"""POST /v1/classify: the probabilities of a classifier's labels for one or more texts."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.deps import InferenceDep, PlatformDep
from service.api.encoder_schemas import CLASSIFY_NEUTRAL, ClassifyRequest
from service.api.encoding import respond, usage_json
from service.api.generation import require, resolve
from service.api.inference_schemas import parse
from service.api.paging import refuse_unknown_query
from service.serving.messages import Encoded

router = APIRouter(tags=["inference"])


@router.post("/v1/classify", response_model=None)
async def classify(request: Request, platform: PlatformDep, caller: InferenceDep) -> Response:
    """Classify texts."""
    refuse_unknown_query(request)
    body = parse(ClassifyRequest, await request.body(), CLASSIFY_NEUTRAL)
    target = await resolve(platform, caller, body.model)
    require(target, "classify", "v1/classify")

    def answer(encoded: Encoded) -> dict[str, Any]:
        rows = encoded.rows.tolist()
        data = [_item(index, encoded.labels, row, body.top_k) for index, row in enumerate(rows)]
        return {"object": "list", "model": target.model_id, "data": data, "usage": usage_json(encoded)}

    return await respond(request, platform, caller, target, body.input, answer)


def _item(index: int, labels: tuple[str, ...], log_probabilities: list[float], top_k: int | None) -> dict[str, Any]:
    """One text's labels, the likeliest first."""
    order = sorted(range(len(labels)), key=lambda number: -log_probabilities[number])[:top_k]
    found = [{"label": labels[number], "probability": math.exp(log_probabilities[number])} for number in order]
    return {"index": index, **found[0], "probabilities": found}
