"""Load: many concurrent chat streams from a process of their own, so that the client's work is not the server's.

That process parses as little as it can: it notes when text arrived, and reads tokens from the server's own usage.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

_TEXT = re.compile(rb'"content": ?"[^"]')
_USAGE = re.compile(rb'"usage": ?\{')
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Load:
    """What one measurement sends."""

    url: str  # of the chat completions route
    key: str
    num_streams: int  # at a time; the next request goes out when one of them has ended
    bodies: list[dict[str, Any]]  # a request each


@dataclass(frozen=True)
class Stream:
    """One request; times are those of `time.monotonic`, which all processes of a machine share."""

    num_prompt_tokens: int
    num_tokens: int
    sent_at: float
    text_at: list[float]  # when each chunk with text came

    @property
    def ttft_s(self) -> float:
        """From the request to the first text."""
        return self.text_at[0] - self.sent_at

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first text."""
        return (self.text_at[-1] - self.text_at[0]) / max(1, self.num_tokens - 1)

    def pauses_s(self, after: float, before: float) -> Iterator[float]:
        """Times between chunks that came within these moments."""
        times = [at for at in self.text_at if after <= at <= before]
        return (late - early for early, late in itertools.pairwise(times))


@dataclass(frozen=True)
class Result:
    """What came back over all streams."""

    wall_s: float
    streams: list[Stream]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all streams over the time from the first request to the last byte."""
        return sum(stream.num_tokens for stream in self.streams) / self.wall_s

    def ttft_s(self, percentile: int) -> float:
        """Of all requests, the time to first text that so many percent of them do not exceed."""
        return _percentile([stream.ttft_s for stream in self.streams], percentile)

    @property
    def tpot_p50_s(self) -> float:
        """Of the median stream."""
        return statistics.median(stream.tpot_s for stream in self.streams)


def _percentile(values: list[float], percentile: int) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, round((len(ranked) - 1) * percentile / 100))]


class Running:
    """A load under way in a fresh process."""

    def __init__(self, load: Load) -> None:
        command = [sys.executable, "-m", "tests.bench.streams"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(load)) + "\n")
        self._process.stdin.flush()

    def result(self, timeout_s: float = 1800.0) -> Result:
        """Wait for the last stream; RuntimeError if any of them failed."""
        output, _ = self._process.communicate(timeout=timeout_s)
        if self._process.returncode:
            raise RuntimeError(f"a stream failed (exit code {self._process.returncode}); its error is above")
        wall_s, streams = json.loads(output)
        return Result(wall_s, [Stream(**stream) for stream in streams])


def measure(load: Load) -> Result:
    """Run the load to its end."""
    return Running(load).result()


async def _stream(session: aiohttp.ClientSession, load: Load, body: dict[str, Any]) -> Stream:
    sent_at, text_at, usage = time.monotonic(), [], b""
    async with session.post(load.url, json=body, headers={"Authorization": f"Bearer {load.key}"}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if _TEXT.search(line):
                text_at.append(time.monotonic())
            if _USAGE.search(line):
                usage = line
    assert text_at, f"a stream without text, ending in {line!r}"
    counts = json.loads(usage.removeprefix(b"data: "))["usage"]
    return Stream(counts.get("prompt_tokens", 0), counts["completion_tokens"], sent_at, text_at)


async def _run(load: Load) -> tuple[float, list[Stream]]:
    bodies, streams = iter(load.bodies), list[Stream]()

    async def one_after_another(session: aiohttp.ClientSession) -> None:
        for body in bodies:
            streams.append(await _stream(session, load, body))

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=_LONGEST_LINE) as session:
        started = time.monotonic()
        await asyncio.gather(*(one_after_another(session) for _ in range(load.num_streams)))
        return time.monotonic() - started, streams


if __name__ == "__main__":
    wall_s, streams = asyncio.run(_run(Load(**json.loads(sys.stdin.readline()))))
    print(json.dumps([wall_s, [asdict(stream) for stream in streams]]))
