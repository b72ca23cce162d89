"""Load: many concurrent chat streams from a process of their own, so that the client's work is not the server's."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import aiohttp


@dataclass(frozen=True)
class Load:
    """What one measurement sends."""

    url: str  # of the chat completions route
    key: str
    model: str
    num_streams: int
    num_tokens: int  # per stream


@dataclass(frozen=True)
class Result:
    """What came back over all streams."""

    num_tokens: int
    wall_s: float
    ttft_p50_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


def measure(load: Load) -> Result:
    """Run the load in a fresh process and wait for it."""
    command = [sys.executable, "-m", "tests.bench.streams", json.dumps(asdict(load))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return Result(**json.loads(done.stdout.splitlines()[-1]))


async def _stream(session: aiohttp.ClientSession, load: Load) -> tuple[int, float]:
    """One stream: tokens by the server's own usage count, and the time to its first text."""
    prompt = " ".join(["a"] * load.num_tokens)  # one token a word, so that it fits a small context
    body = {
        "model": load.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": load.num_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, num_tokens = time.perf_counter(), 0.0, 0
    async with session.post(load.url, json=body, headers={"Authorization": f"Bearer {load.key}"}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if not first and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - started
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
    return num_tokens, first


async def _run(load: Load) -> Result:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        started = time.perf_counter()
        streams = await asyncio.gather(*(_stream(session, load) for _ in range(load.num_streams)))
        wall_s = time.perf_counter() - started
    firsts = sorted(first for _, first in streams)
    return Result(sum(num for num, _ in streams), wall_s, firsts[len(firsts) // 2])


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(_run(Load(**json.loads(sys.argv[1])))))))
