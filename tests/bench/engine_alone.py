"""Our engine in a process of its own, without HTTP or Ray: `python -m tests.bench.engine_alone SETTINGS`.

SETTINGS is a JSON object of the fields of `Settings`. Prints one with `ready_s`, from the process's start until the
engine was ready, `tokens_per_s` over all prompts from the first to the last, and `decode_tokens_per_s`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from service.engine.native.engine import NativeEngine
from service.engine.protocol import AdapterRef, GenerateRequest, SamplingParams
from training.render import Renderer


@dataclass(frozen=True)
class Settings:
    """One measurement: all prompts at once, so many tokens for each, so many sequences at a time."""

    model: str  # folder
    prompts: str  # JSON file: token ids of each prompt; the first `batch_size` warm the engine up
    batch_size: int
    num_tokens: int
    num_threads: int
    adapters: list[str] = field(default_factory=list)  # folders of those that prompts use in turn


async def main(settings: Settings) -> None:
    """Load, warm up, measure."""
    folder, prompts = Path(settings.model), json.loads(Path(settings.prompts).read_text())
    renderer = Renderer.load(folder)
    engine = NativeEngine(
        folder,
        tokenizer=renderer.tokenizer,
        dtype="bf16",
        max_batch_size=settings.batch_size,
        max_resident_adapters=max(1, len(settings.adapters)),
        num_threads=settings.num_threads,
        stop_token_ids=renderer.stop_token_ids,
    )
    await engine.start()
    ready_s = time.time() - psutil.Process().create_time()
    adapters = [AdapterRef(path, Path(path)) for path in settings.adapters] or [None]

    async def generate(i: int) -> list[float]:
        """When each token of prompt i came."""
        sampling = SamplingParams(settings.num_tokens, temperature=0.0)
        request = GenerateRequest(f"{i}", tuple(prompts[i]), sampling, adapter=adapters[i % len(adapters)])
        at: list[float] = []
        async for deltas in engine.generate(request):
            at += [time.perf_counter()] * sum(delta.num_tokens for delta in deltas)
        assert len(at) == settings.num_tokens, "an answer ended early"
        return at

    await asyncio.gather(*map(generate, range(settings.batch_size)))
    started = time.perf_counter()
    times = await asyncio.gather(*map(generate, range(settings.batch_size, len(prompts))))
    elapsed = time.perf_counter() - started
    await engine.stop()
    speeds = {"tokens_per_s": sum(map(len, times)) / elapsed, "decode_tokens_per_s": decode_tokens_per_s(times)}
    print(json.dumps({"ready_s": ready_s, **speeds}))


def decode_tokens_per_s(times: list[list[float]]) -> float:
    """Tokens that came while all sequences decoded, over that time; 0 if there was no such time.

    `times`: when each token of each sequence came.
    """
    begin, end = max(at[0] for at in times), min(at[-1] for at in times)
    if end <= begin:
        return 0.0
    return sum(begin < moment <= end for at in times for moment in at) / (end - begin)


if __name__ == "__main__":
    asyncio.run(main(Settings(**json.loads(sys.argv[1]))))
