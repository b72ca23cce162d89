"""Helpers to drive an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from service.engine.admission import EngineFailed
from service.engine.echo import EchoEngine
from service.engine.native.engine import NativeEngine
from service.engine.protocol import AdapterRef, FinishReason, GenerateRequest, SamplingParams

AnyEngine = EchoEngine | NativeEngine
__all__ = ["Answer", "AnyEngine", "EngineFailed", "ask", "collect", "running"]


@dataclass
class Answer:
    """One choice, whole."""

    text: str = ""
    num_tokens: int = 0
    finish_reason: FinishReason | None = None


@asynccontextmanager
async def running(engine: AnyEngine) -> AsyncIterator[AnyEngine]:
    """Start and stop."""
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def ask(
    prompt: tuple[int, ...], max_tokens: int, *, n: int = 1, adapter: AdapterRef | None = None, **sampling: object
) -> GenerateRequest:
    """A request, greedy unless told otherwise."""
    params = SamplingParams(max_tokens, **{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return GenerateRequest("request", prompt, params, n=n, adapter=adapter)


async def collect(engine: AnyEngine, request: GenerateRequest) -> list[Answer]:
    """All choices of a request; every choice must end exactly once."""
    answers = [Answer() for _ in range(request.n)]
    async for deltas in engine.generate(request):
        assert deltas
        for delta in deltas:
            answer = answers[delta.index]
            assert answer.finish_reason is None, "output after the end"
            answer.text += delta.text
            answer.num_tokens += delta.num_tokens
            answer.finish_reason = delta.finish_reason
    assert all(answer.finish_reason for answer in answers)
    return answers
