"""What all parts of the serving benchmark share: the model, the prompts, our service with it, measured loads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import streams
from tests.bench.material import SIZES
from tests.bench.servers import NUM_THREADS, Server, add_base, tunesmith
from tests.bench.serving_material import Prompts, make_model

NUM_PROMPT_TOKENS, NUM_TOKENS = 50, 64
MAX_CONTEXT = 8192
MAX_BATCH_SIZE = 64  # as many as the largest load has streams
NUM_ROUNDS = 3  # of each load; the one with the median speed counts
MIN_REQUESTS, REQUESTS_PER_STREAM = 8, 3


@dataclass(frozen=True)
class Service:
    """Our whole service with the model as its only base, `base`."""

    server: Server
    home: Path


class Setup:
    """A folder with the model; every request of a run has a prompt of its own, so that no side finds one cached."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model(folder, "base", SIZES["110m"] | {"max_position_embeddings": MAX_CONTEXT})
        self.prompts = Prompts(self.model)

    @contextmanager
    def ours(self, max_resident_adapters: int = 64) -> Iterator[Service]:
        """`tunesmith up`, until the base answers; the same threads as the peers, room for the largest load."""
        settings = {
            "engine_num_threads": NUM_THREADS,
            "max_batch_size": MAX_BATCH_SIZE,
            "max_resident_adapters": max_resident_adapters,
        }
        with tempfile.TemporaryDirectory(dir=self.folder) as home, tunesmith(Path(home), **settings) as server:
            add_base(server.client(), "base", str(self.model))
            streams.measure(self.load(server, ["base"], 1, num_requests=1))
            yield Service(server, Path(home))

    def load(
        self,
        server: Server,
        models: Sequence[str],
        num_streams: int,
        *,
        num_prompt_tokens: int = NUM_PROMPT_TOKENS,
        num_tokens: int = NUM_TOKENS,
        num_requests: int = 0,
    ) -> streams.Load:
        """Greedy streaming chats, spread over the models in turn; 0 requests means enough for a steady figure."""
        num_requests = num_requests or max(MIN_REQUESTS, REQUESTS_PER_STREAM * num_streams)
        bodies: list[dict[str, Any]] = [
            {
                "model": models[i % len(models)],
                "messages": chat,
                "max_tokens": num_tokens,
                "temperature": 0.0,
                "stream": True,
                **server.body,
            }
            for i, chat in enumerate(self.prompts.chats(num_requests, num_prompt_tokens))
        ]
        return streams.Load(server.chat_url, server.key, num_streams, bodies)

    def measure(
        self, side: str, server: Server, models: Sequence[str], num_streams: int, **load: int
    ) -> streams.Result:
        """The round with the median speed; RuntimeError if a server did less or more than it was asked to."""
        rounds = []
        for _ in range(NUM_ROUNDS):
            result = streams.measure(self.load(server, models, num_streams, **load))
            _check(side, result, load.get("num_prompt_tokens", NUM_PROMPT_TOKENS), load.get("num_tokens", NUM_TOKENS))
            rounds.append(result)
        result = sorted(rounds, key=lambda one: one.tokens_per_s)[NUM_ROUNDS // 2]
        speeds = ", ".join(f"{one.tokens_per_s:.0f}" for one in rounds)
        print(f"{side}, {num_streams} streams: {speeds} tokens/s", flush=True)
        return result


def _check(side: str, result: streams.Result, num_prompt_tokens: int, num_tokens: int) -> None:
    for stream in result.streams:
        if (stream.num_prompt_tokens, stream.num_tokens) != (num_prompt_tokens, num_tokens):
            raise RuntimeError(
                f"{side} read {stream.num_prompt_tokens} tokens and wrote {stream.num_tokens}, "
                f"not {num_prompt_tokens} and {num_tokens}"
            )


def figures_of(side: str, suffix: str, result: streams.Result) -> dict[str, float]:
    """The plain figures of one side under one load."""
    return {
        f"{side}_tokens_per_s_{suffix}": result.tokens_per_s,
        f"{side}_tpot_p50_ms_{suffix}": result.tpot_p50_s * 1000,
        f"{side}_ttft_p50_ms_{suffix}": result.ttft_s(50) * 1000,
        f"{side}_ttft_p99_ms_{suffix}": result.ttft_s(99) * 1000,
    }


def ttft_ratios(prefix: str, suffix: str, ours: streams.Result, theirs: streams.Result) -> dict[str, float]:
    """Our times to first text over theirs."""
    return {
        f"{prefix}ttft_p{percent}_vs_vllm_{suffix}": ours.ttft_s(percent) / theirs.ttft_s(percent)
        for percent in (50, 99)
    }
