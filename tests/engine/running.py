"""Helpers to drive an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from service.engine.admission import EngineFailed
from service.engine.echo import EchoEngine
from service.engine.native.engine import NativeEngine
from service.engine.protocol import AdapterRef, Delta, FinishReason, GenerateRequest, SamplingParams, TokenLogprob
from service.engine.vllm import VllmEngine

AnyEngine = EchoEngine | NativeEngine | VllmEngine
__all__ = ["Answer", "AnyEngine", "EngineFailed", "ask", "collect", "running"]


@dataclass
class Answer:
    """One choice, whole."""

    text: str = ""
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Its next part."""
        assert self.finish_reason is None, "output after the end"
        self.text += delta.text
        self.num_tokens += delta.num_tokens
        self.finish_reason = delta.finish_reason
        self.logprobs += delta.logprobs


@asynccontextmanager
async def running(engine: AnyEngine) -> AsyncIterator[AnyEngine]:
    """Start and stop."""
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def ask(
    prompt: tuple[int, ...],
    max_tokens: int,
    *,
    n: int = 1,
    adapter: AdapterRef | None = None,
    echo: bool = False,
    **sampling: object,
) -> GenerateRequest:
    """A request, greedy unless told otherwise."""
    params = SamplingParams(max_tokens, **{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return GenerateRequest("request", prompt, params, n=n, adapter=adapter, echo=echo)


async def collect(engine: AnyEngine, request: GenerateRequest) -> list[Answer]:
    """All choices of a request; every choice must end exactly once."""
    answers = [Answer() for _ in range(request.n)]
    async for deltas in engine.generate(request):
        assert deltas
        for delta in deltas:
            answers[delta.index].add(delta)
    assert all(answer.finish_reason for answer in answers)
    return answers
