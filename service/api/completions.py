"""POST /v1/completions: OpenAI's older form, which continues text."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.deps import InferenceDep, PlatformDep
from service.api.generation import Choice, Generation, Usage, require, resolve, respond, serve_requests
from service.api.inference_schemas import COMPLETION_NEUTRAL, DEFAULT_COMPLETION_TOKENS, CompletionRequest, parse
from service.api.logprobs import completion_logprobs
from service.api.paging import refuse_unknown_query
from service.api.sse import encode_text, frame
from service.engine.protocol import Delta, TokenLogprob
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
    requests = serve_requests(
        id,
        target,
        prompts,
        body,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        logprobs=body.logprobs,
        echo=bool(body.echo),
    )
    generation = Generation(platform, caller, requests, request.state.received_at)
    return await respond(request, generation, CompletionAnswer(id, target, body), body)


class CompletionAnswer:
    """JSON of `text_completion`, whose chunks have the same form as the whole."""

    def __init__(self, id: str, target: Target, body: CompletionRequest) -> None:
        self._has_logprobs = body.logprobs is not None
        self._shared: dict[str, Any] = {
            "id": id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": target.model_id,
            "system_fingerprint": None,
        }
        self._before = "data: " + json.dumps(self._shared, separators=(",", ":"))[:-1] + ',"choices":[{"index":'
        self._after = "}]" + (',"usage":null' if body.wants_usage else "") + "}\n\n"

    def opening(self) -> bytes:
        """Nothing: choices need no introduction here."""
        return b""

    def chunks(self, deltas: list[Delta]) -> bytes:
        """One chunk per delta."""
        return "".join(map(self._chunk, deltas)).encode()

    def _chunk(self, delta: Delta) -> str:
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return ""
        reason = f'"{delta.finish_reason}"' if delta.finish_reason is not None else "null"
        text, logprobs = encode_text(delta.text), json.dumps(self._logprobs(delta.logprobs))
        return f'{self._before}{delta.index},"text":{text},"logprobs":{logprobs},"finish_reason":{reason}{self._after}'

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return completion_logprobs(tokens) if self._has_logprobs else None

    def usage_chunk(self, used: Usage) -> bytes:
        """The last chunk, without choices."""
        return frame({**self._shared, "choices": [], "usage": used.to_json()})

    def whole(self, choices: list[Choice], used: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        written = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._shared, "choices": written, "usage": used.to_json()}
