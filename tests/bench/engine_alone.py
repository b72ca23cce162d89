"""Our engine in a process of its own, without HTTP or Ray: `python -m tests.bench.engine_alone SETTINGS`.

SETTINGS is a JSON object of the fields of `Settings`. Prints [seconds from the process's start until ready, tokens/s].
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from service.engine.native.engine import NativeEngine
from service.engine.protocol import GenerateRequest, SamplingParams
from training.render import Renderer


@dataclass(frozen=True)
class Settings:
    """One measurement: all prompts at once, so many tokens for each, so many sequences at a time."""

    model: str  # folder
    prompts: str  # JSON file: token ids of each prompt; the first `batch_size` warm the engine up
    batch_size: int
    num_tokens: int
    num_threads: int


async def main(settings: Settings) -> None:
    """Load, warm up, measure."""
    folder, prompts = Path(settings.model), json.loads(Path(settings.prompts).read_text())
    renderer = Renderer.load(folder)
    engine = NativeEngine(
        folder,
        tokenizer=renderer.tokenizer,
        dtype="bf16",
        max_batch_size=settings.batch_size,
        num_threads=settings.num_threads,
        stop_token_ids=renderer.stop_token_ids,
    )
    await engine.start()
    ready_s = time.time() - psutil.Process().create_time()

    async def generate(token_ids: list[int]) -> int:
        sampling = SamplingParams(settings.num_tokens, temperature=0.0)
        request = GenerateRequest("-", tuple(token_ids), sampling)
        return sum([delta.num_tokens async for deltas in engine.generate(request) for delta in deltas])

    await asyncio.gather(*map(generate, prompts[: settings.batch_size]))
    measured = prompts[settings.batch_size :]
    started = time.perf_counter()
    num_tokens = sum(await asyncio.gather(*map(generate, measured)))
    elapsed = time.perf_counter() - started
    await engine.stop()
    assert num_tokens == settings.num_tokens * len(measured), "an answer ended early"
    print(json.dumps([ready_s, num_tokens / elapsed]))


if __name__ == "__main__":
    asyncio.run(main(Settings(**json.loads(sys.argv[1]))))
