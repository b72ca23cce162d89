"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.deps import InferenceDep, PlatformDep
from service.api.generation import Choice, Generation, Usage, require, resolve, respond, serve_requests
from service.api.inference_schemas import CHAT_NEUTRAL, ChatRequest, parse
from service.api.logprobs import chat_content
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
        logprobs=body.num_logprobs,
    )
    generation = Generation(platform, caller, requests, request.state.received_at)
    return await respond(request, generation, ChatAnswer(id, target, generation.num_choices, body), body)


class ChatAnswer:
    """JSON of `chat.completion` and `chat.completion.chunk`. What chunks share is written once."""

    def __init__(self, id: str, target: Target, num_choices: int, body: ChatRequest) -> None:
        self._head: dict[str, Any] = {"id": id, "created": int(time.time()), "model": target.model_id}
        self._num_choices = num_choices
        self._has_logprobs = body.num_logprobs is not None
        shared = self._shared = {**self._head, "object": "chat.completion.chunk", "system_fingerprint": None}
        self._before = "data: " + json.dumps(shared, separators=(",", ":"))[:-1] + ',"choices":[{"index":'
        self._after = "}]" + (',"usage":null' if body.wants_usage else "") + "}\n\n"

    def opening(self) -> bytes:
        """The role of every choice, in order: the client's helper meets new choices by appending them."""
        delta = '{"role":"assistant","content":"","refusal":null}'
        return "".join(self._chunk(index, delta, "null") for index in range(self._num_choices)).encode()

    def chunks(self, deltas: list[Delta]) -> bytes:
        """Text, and the end of a choice as a chunk of its own."""
        parts = []
        for delta in deltas:
            content = chat_content(delta.logprobs) if self._has_logprobs else []
            if delta.text or content:
                logprobs = json.dumps({"content": content, "refusal": None}) if self._has_logprobs else "null"
                parts.append(self._chunk(delta.index, '{"content":' + encode_text(delta.text) + "}", "null", logprobs))
            if delta.finish_reason is not None:
                parts.append(self._chunk(delta.index, "{}", f'"{delta.finish_reason}"'))
        return "".join(parts).encode()

    def _chunk(self, index: int, delta: str, reason: str, logprobs: str = "null") -> str:
        return f'{self._before}{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{reason}{self._after}'

    def usage_chunk(self, used: Usage) -> bytes:
        """The last chunk: without choices, nothing may follow it."""
        return frame({**self._shared, "choices": [], "usage": used.to_json()})

    def whole(self, choices: list[Choice], used: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        written: list[dict[str, Any]] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []},
                "logprobs": {"content": chat_content(choice.logprobs), "refusal": None} if self._has_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {
            "object": "chat.completion",
            **self._head,
            "choices": written,
            "usage": used.to_json(),
            "service_tier": "default",
            "system_fingerprint": None,
        }
