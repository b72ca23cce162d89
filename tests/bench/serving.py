"""Serving beside its peers: our whole service (gateway, Ray Serve, replica) beside vLLM and `transformers serve`.

A random Llama of 110M parameters in bf16, 50 tokens in, 64 out, greedy, streaming chat completions over HTTP at 1, 8,
32 and 64 streams at a time. Every side has a thread per core and runs while the others do not; the client is a process
of its own. No answer ends early (see `serving_material`), and each side is warmed up by the largest load first.
A ratio of speeds is ours over theirs; so is one of times to first text (`ttft`), where less is better.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from tests.bench import serving_adapters, streams
from tests.bench.engine_alone import Settings
from tests.bench.processes import ROOT
from tests.bench.servers import NUM_THREADS, VLLM, Server, last_figures, transformers, vllm, vllm_environment
from tests.bench.serving_setup import MAX_CONTEXT, NUM_PROMPT_TOKENS, NUM_TOKENS, Setup, figures_of, ttft_ratios

NUM_STREAMS = (1, 8, 32, 64)
BATCH_SIZES, NUM_ENGINE_PROMPTS = (32, 64), 96
NUM_LONG_PROMPT_TOKENS, NUM_LONG_STREAMS = 4096, 8
VLLM_GENERATE = ROOT / "tests/bench/peers/vllm_generate.py"

GOALS = {
    "base_vs_vllm_c1": ">= 1.0",
    "base_vs_vllm_c8": ">= 1.0",
    "base_vs_vllm_c32": ">= 1.2",
    "base_vs_vllm_c64": ">= 1.2",
    "base_vs_transformers_c8": ">= 2",
    "base_vs_transformers_c32": ">= 3",
    **{f"ttft_p{percent}_vs_vllm_c{num}": "<= 1" for num in NUM_STREAMS for percent in (50, 99)},
    "engine_vs_vllm_b32": ">= 1.3",
    "engine_vs_vllm_b64": ">= 1.3",
    "engine_ready_s": "<= 10",
    "long_vs_vllm_c8": ">= 1",
    **serving_adapters.GOALS,
}


def run(only: str | None = None) -> dict[str, float]:
    """All figures, or those of one part."""
    if not VLLM.exists():
        sys.exit("run `make peers` first")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(Path(folder))
        for name, part in _PARTS.items():
            if only in (None, name):
                figures |= part(setup)
    return figures


def _base(setup: Setup) -> dict[str, float]:
    """The three servers, one after another, each at every number of streams."""
    figures: dict[str, float] = {}
    results: dict[str, dict[int, streams.Result]] = {}
    for side in ("ours", "vllm", "transformers"):
        with ExitStack() as stack:
            server, model = _start(setup, side, stack)
            figures[f"{side}_server_ready_s"] = server.ready_s
            streams.measure(setup.load(server, [model], max(NUM_STREAMS)))  # warm-up
            results[side] = {num: setup.measure(side, server, [model], num) for num in NUM_STREAMS}
        for num, result in results[side].items():
            figures |= figures_of(side, f"c{num}", result)
    for num in NUM_STREAMS:
        ours, theirs, hugging_face = (results[side][num] for side in ("ours", "vllm", "transformers"))
        figures[f"base_vs_vllm_c{num}"] = ours.tokens_per_s / theirs.tokens_per_s
        figures[f"base_vs_transformers_c{num}"] = ours.tokens_per_s / hugging_face.tokens_per_s
        figures |= ttft_ratios("", f"c{num}", ours, theirs)
    return figures


def _start(setup: Setup, side: str, stack: ExitStack) -> tuple[Server, str]:
    """A side's server, and what it calls the base."""
    log = setup.folder / f"{side}.log"
    if side == "ours":
        return stack.enter_context(setup.ours()).server, "base"
    if side == "vllm":
        return stack.enter_context(vllm(setup.model, log, max_context=MAX_CONTEXT)), "base"
    return stack.enter_context(transformers(setup.model, log)), str(setup.model)


def _engine(setup: Setup) -> dict[str, float]:
    """Both engines without HTTP on the same prompts, each in a process of its own; and how long they take to start."""
    figures: dict[str, float] = {}
    for batch_size in BATCH_SIZES:
        prompts = setup.folder / f"prompts-{batch_size}.json"
        token_ids = setup.prompts.token_ids(batch_size + NUM_ENGINE_PROMPTS, NUM_PROMPT_TOKENS)
        prompts.write_text(json.dumps(token_ids))
        settings = json.dumps(asdict(Settings(str(setup.model), str(prompts), batch_size, NUM_TOKENS, NUM_THREADS)))
        ours = last_figures([sys.executable, "-m", "tests.bench.engine_alone", settings])
        theirs = last_figures([str(VLLM), str(VLLM_GENERATE), settings], vllm_environment())
        speed, their_speed = ours["tokens_per_s"], theirs["tokens_per_s"]
        print(f"engine alone, {batch_size} sequences: {speed:.0f} tokens/s, vLLM {their_speed:.0f}", flush=True)
        figures |= {
            "engine_ready_s": ours["ready_s"],
            "vllm_engine_ready_s": theirs["ready_s"],
            f"engine_tokens_per_s_b{batch_size}": speed,
            f"vllm_engine_tokens_per_s_b{batch_size}": their_speed,
            f"engine_vs_vllm_b{batch_size}": speed / their_speed,
        }
    return figures


def _long(setup: Setup) -> dict[str, float]:
    """Long prompts, at one number of streams."""
    figures: dict[str, float] = {}
    results: dict[str, streams.Result] = {}
    load = {"num_prompt_tokens": NUM_LONG_PROMPT_TOKENS, "num_requests": 2 * NUM_LONG_STREAMS}
    suffix = f"c{NUM_LONG_STREAMS}"
    for side in ("ours", "vllm"):
        with ExitStack() as stack:
            server, model = _start(setup, side, stack)
            streams.measure(setup.load(server, [model], NUM_LONG_STREAMS, **(load | {"num_requests": 1})))  # warm-up
            results[side] = setup.measure(f"{side}, long prompts", server, [model], NUM_LONG_STREAMS, **load)
        figures |= figures_of(f"{side}_long", suffix, results[side])
    figures[f"long_vs_vllm_{suffix}"] = results["ours"].tokens_per_s / results["vllm"].tokens_per_s
    return figures | ttft_ratios("long_", suffix, results["ours"], results["vllm"])


_PARTS: dict[str, Callable[[Setup], dict[str, float]]] = {
    "base": _base,
    "engine": _engine,
    "adapters": serving_adapters.speeds,
    "hot-load": serving_adapters.hot_load,
    "memory": serving_adapters.memory,
    "long": _long,
}
PARTS = tuple(_PARTS)
