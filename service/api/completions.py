"""POST /v1/completions: OpenAI's older form, which continues text."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.deps import InferenceDep, PlatformDep
from service.api.generation import Generation, Usage, require, resolve, respond, serve_requests
from service.api.inference_schemas import COMPLETION_NEUTRAL, DEFAULT_COMPLETION_TOKENS, CompletionRequest, parse
from service.api.paging import refuse_unknown_query
from service.api.sse import encode_text, frame
from service.engine.protocol import Delta
from service.serving.messages import Prompt, Target, TextPrompt, TokenPrompt

router = APIRouter(tags=["inference"])


@router.post("/v1/completions", response_model=None)
async def create_completion(request: Request, platform: PlatformDep, caller: InferenceDep) -> Response:
    """Continue one or more prompts, streamed or whole."""
    refuse_unknown_query(request)
    body = parse(CompletionRequest, await request.body(), COMPLETION_NEUTRAL)
    target = await resolve(platform, caller, body.model)
    require(target, "completions", "v1/completions")
    id = "cmpl-" + secrets.token_hex(15)
    prompts: list[Prompt] = [
        TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(tuple(prompt)) for prompt in body.prompts()
    ]
    limits = {"max_tokens": body.max_tokens, "default_max_tokens": DEFAULT_COMPLETION_TOKENS}
    requests = serve_requests(id, target, prompts, body, **limits)
    generation = Generation(platform, caller, requests, request.state.received_at)
    return await respond(request, generation, CompletionAnswer(id, target, body.wants_usage), body)


class CompletionAnswer:
    """JSON of `text_completion`, whose chunks have the same form as the whole."""

    def __init__(self, id: str, target: Target, wants_usage: bool) -> None:
        self._shared: dict[str, Any] = {
            "id": id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": target.model_id,
            "system_fingerprint": None,
        }
        self._before = "data: " + json.dumps(self._shared, separators=(",", ":"))[:-1] + ',"choices":[{"index":'
        self._after = "}]" + (',"usage":null' if wants_usage else "") + "}\n\n"

    def opening(self) -> bytes:
        """Nothing: choices need no introduction here."""
        return b""

    def chunks(self, deltas: list[Delta]) -> bytes:
        """One chunk per delta."""
        return "".join(map(self._chunk, deltas)).encode()

    def _chunk(self, delta: Delta) -> str:
        if not delta.text and delta.finish_reason is None:
            return ""
        reason = f'"{delta.finish_reason}"' if delta.finish_reason is not None else "null"
        text = encode_text(delta.text)
        return f'{self._before}{delta.index},"text":{text},"logprobs":null,"finish_reason":{reason}{self._after}'

    def usage_chunk(self, used: Usage) -> bytes:
        """The last chunk, without choices."""
        return frame({**self._shared, "choices": [], "usage": used.to_json()})

    def whole(self, texts: list[str], reasons: list[str], used: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self._shared, "choices": choices, "usage": used.to_json()}
