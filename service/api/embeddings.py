"""POST /v1/embeddings: texts as vectors."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.deps import InferenceDep, PlatformDep
from service.api.encoder_schemas import EMBEDDINGS_NEUTRAL, EmbeddingsRequest
from service.api.encoding import respond, usage_json
from service.api.generation import require, resolve
from service.api.inference_schemas import parse
from service.api.paging import refuse_unknown_query
from service.serving.messages import Encoded

router = APIRouter(tags=["inference"])


@router.post("/v1/embeddings", response_model=None)
async def create_embeddings(request: Request, platform: PlatformDep, caller: InferenceDep) -> Response:
    """Embed texts or lists of token ids."""
    refuse_unknown_query(request)
    body = parse(EmbeddingsRequest, await request.body(), EMBEDDINGS_NEUTRAL)
    target = await resolve(platform, caller, body.model)
    require(target, "embed", "v1/embeddings")

    def answer(encoded: Encoded) -> dict[str, Any]:
        rows: list[Any] = encoded.rows.tolist()
        if body.encoding_format == "base64":  # little-endian float32, as the client reads it
            rows = [base64.b64encode(row.tobytes()).decode() for row in encoded.rows.astype("<f4")]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        return {"object": "list", "model": target.model_id, "data": data, "usage": usage_json(encoded)}

    return await respond(request, platform, caller, target, body.input, answer)
