"""The peer of the gateway benchmark: the least FastAPI gateway on Ray Serve with the same two hops. No keys, no
metrics, no checks: one token per message from the engine deployment, one SSE event per message.

Annotations are real here, not postponed: FastAPI resolves those of a Serve ingress class in another process.
"""

import asyncio
import json
from collections.abc import AsyncIterator

from fastapi import FastAPI
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

app = FastAPI()


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
class BareEngine:
    """One token per interval."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s

    async def generate(self, prompt: str, num_tokens: int) -> AsyncIterator[str]:
        for word in prompt.split()[:num_tokens]:
            await asyncio.sleep(self.interval_s)
            yield word + " "


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
@serve.ingress(app)
class BareGateway:
    """Forwards tokens as chat chunks."""

    def __init__(self, engine: serve.handle.DeploymentHandle) -> None:
        self.engine = engine.options(stream=True)

    @app.post("/bare/chat")
    async def chat(self, request: Request) -> StreamingResponse:
        body = await request.json()
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict) -> AsyncIterator[str]:
        num_tokens = 0
        async for word in self.engine.generate.remote(body["messages"][-1]["content"], body["max_tokens"]):
            num_tokens += 1
            chunk = {
                "id": "chatcmpl-bare",
                "object": "chat.completion.chunk",
                "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}],
            }
            yield f"data: {json.dumps(chunk)}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': num_tokens}})}\n\n"
        yield "data: [DONE]\n\n"


def deploy(interval_s: float) -> str:
    """Run it beside what Serve runs already; returns the route."""
    serve.run(BareGateway.bind(BareEngine.bind(interval_s)), name="bare", route_prefix="/peer")
    return "/peer/bare/chat"
