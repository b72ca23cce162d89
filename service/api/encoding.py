"""What the endpoints of encoders have in common: from texts to the engine's rows, to one JSON answer, and its costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from service.api.generation import Usage, account
from service.api.sse import ClientGone, Connection, Disconnected
from service.auth import Caller
from service.platform import Platform
from service.serving.messages import Encoded, EncodeRequest, Target

Input = str | Sequence[int]


async def respond(
    request: Request,
    platform: Platform,
    caller: Caller,
    target: Target,
    inputs: Input | Sequence[Input],
    answer: Callable[[Encoded], dict[str, Any]],
) -> Response:
    """Encode the inputs and answer with the JSON that `answer` makes of their rows. One text, or one list of token
    ids, is one input."""
    is_one = isinstance(inputs, str) or isinstance(inputs[0], int)
    listed: Sequence[Any] = [inputs] if is_one else inputs
    frozen = tuple(item if isinstance(item, str) else tuple(item) for item in listed)
    work = EncodeRequest(request.state.request_id, target, frozen, is_list=not is_one)
    connection = Connection(request)
    try:
        encoded = await connection.unless_gone(_encode(platform, caller, work))
    except Disconnected:
        return ClientGone()
    finally:
        await connection.close()
    return JSONResponse(answer(encoded), headers={"x-model-version": target.model_id})


async def _encode(platform: Platform, caller: Caller, work: EncodeRequest) -> Encoded:
    async with aclosing(platform.engines.stream(work.target, work)) as outputs:
        encoded = await anext(outputs)
    assert isinstance(encoded, Encoded)
    account(platform, caller, work.target, Usage(prompt_tokens=encoded.num_tokens))
    return encoded


def usage_json(encoded: Encoded) -> dict[str, int]:
    """OpenAI's usage of an answer without generated tokens."""
    return {"prompt_tokens": encoded.num_tokens, "total_tokens": encoded.num_tokens}
