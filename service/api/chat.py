"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.deps import InferenceDep, PlatformDep
from service.api.generation import Generation, Usage, require, resolve, respond, serve_requests
from service.api.inference_schemas import CHAT_NEUTRAL, ChatRequest, parse
from service.api.paging import refuse_unknown_query
from service.api.sse import encode_text, frame
from service.engine.protocol import Delta
from service.serving.messages import ChatPrompt, Target

router = APIRouter(tags=["inference"])


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(request: Request, platform: PlatformDep, caller: InferenceDep) -> Response:
    """Answer a conversation, streamed or whole."""
    refuse_unknown_query(request)
    body = parse(ChatRequest, await request.body(), CHAT_NEUTRAL)
    target = await resolve(platform, caller, body.model)
    require(target, "chat", "v1/chat/completions")
    id = "chatcmpl-" + secrets.token_hex(15)
    prompt = ChatPrompt(tuple(message.to_record() for message in body.messages))
    uses_new_name = body.max_completion_tokens is not None
    requests = serve_requests(
        id,
        target,
        [prompt],
        body,
        max_tokens=body.max_completion_tokens if uses_new_name else body.max_tokens,
        max_tokens_param="max_completion_tokens" if uses_new_name else "max_tokens",
    )
    generation = Generation(platform, caller, requests, request.state.received_at)
    return await respond(request, generation, ChatAnswer(id, target, generation.num_choices, body.wants_usage), body)


class ChatAnswer:
    """JSON of `chat.completion` and `chat.completion.chunk`. What chunks share is written once."""

    def __init__(self, id: str, target: Target, num_choices: int, wants_usage: bool) -> None:
        self._head: dict[str, Any] = {"id": id, "created": int(time.time()), "model": target.model_id}
        self._num_choices = num_choices
        shared = self._shared = {**self._head, "object": "chat.completion.chunk", "system_fingerprint": None}
        self._before = "data: " + json.dumps(shared, separators=(",", ":"))[:-1] + ',"choices":[{"index":'
        self._after = "}]" + (',"usage":null' if wants_usage else "") + "}\n\n"

    def opening(self) -> bytes:
        """The role of every choice, in order: the client's helper meets new choices by appending them."""
        delta = '{"role":"assistant","content":"","refusal":null}'
        return "".join(self._chunk(index, delta, "null") for index in range(self._num_choices)).encode()

    def chunks(self, deltas: list[Delta]) -> bytes:
        """Text, and the end of a choice as a chunk of its own."""
        parts = []
        for delta in deltas:
            if delta.text:
                parts.append(self._chunk(delta.index, '{"content":' + encode_text(delta.text) + "}", "null"))
            if delta.finish_reason is not None:
                parts.append(self._chunk(delta.index, "{}", f'"{delta.finish_reason}"'))
        return "".join(parts).encode()

    def _chunk(self, index: int, delta: str, reason: str) -> str:
        return f'{self._before}{index},"delta":{delta},"logprobs":null,"finish_reason":{reason}{self._after}'

    def usage_chunk(self, used: Usage) -> bytes:
        """The last chunk: without choices, nothing may follow it."""
        return frame({**self._shared, "choices": [], "usage": used.to_json()})

    def whole(self, texts: list[str], reasons: list[str], used: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        choices: list[dict[str, Any]] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": reason,
            }
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {
            "object": "chat.completion",
            **self._head,
            "choices": choices,
            "usage": used.to_json(),
            "service_tier": "default",
            "system_fingerprint": None,
        }
