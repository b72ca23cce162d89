"""Many fine-tuned models on one base: speed beside vLLM, loading while streams run, and memory.

Adapters are PEFT folders of rank 16 on all linear layers with random factors. Ours are published as a finished training
job would leave them, files in storage and a row each, and are then called by name through the gateway.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import httpx2
import psutil

from service.serving.naming import ENGINE_DEPLOYMENT
from tests.bench import streams
from tests.bench.servers import Server, vllm
from tests.bench.serving_material import RANK, publish_adapters, save_adapters
from tests.bench.serving_setup import MAX_CONTEXT, Setup, figures_of, ttft_ratios

GOALS = {
    "adapters8_vs_vllm_c8": ">= 5",
    "adapters8_vs_vllm_c32": ">= 5",
    "adapters64_vs_own_base_c32": ">= 0.8",
    "adapters8_ttft_p50_vs_vllm_c32": "<= 0.1",
    "adapters8_ttft_p99_vs_vllm_c32": "<= 0.1",
    "adapter_load_ms": "<= 100",
    "adapter_load_extra_steps": "<= 1",
    "adapter_memory_vs_weights": "<= 1.1",
    "num_adapters_registered": ">= 1000",
    "num_adapters_resident": ">= 100",
}
NUM_FEW, NUM_MANY = 8, 64
NUM_STREAMS = (8, 32)
NUM_LOADS, LOADING_STREAMS, LOADING_TOKENS = 8, 32, 1024
NUM_RESIDENT, NUM_REGISTERED = 100, 1000
METRICS_TIMEOUT_S = 60.0


def speeds(setup: Setup) -> dict[str, float]:
    """8 adapters on both sides, then 64 on ours beside our own speed without."""
    folders = save_adapters(setup.model, setup.folder / "adapters", NUM_MANY)
    names = [f"adapter-{i}" for i in range(NUM_MANY)]
    few = names[:NUM_FEW]
    with setup.ours() as service:
        publish_adapters(service.home, "base", folders, names)
        streams.measure(setup.load(service.server, names, max(NUM_STREAMS), num_requests=2 * NUM_MANY))  # warm-up
        ours = {num: setup.measure("ours, 8 adapters", service.server, few, num) for num in NUM_STREAMS}
        many = setup.measure("ours, 64 adapters", service.server, names, 32)
        base = setup.measure("ours, no adapters", service.server, ["base"], 32)
    figures = figures_of("ours_adapters64", "c32", many) | figures_of("ours_adapters0", "c32", base)
    figures["adapters64_vs_own_base_c32"] = many.tokens_per_s / base.tokens_per_s
    served = dict(zip(few, folders, strict=False))
    with vllm(setup.model, setup.folder / "vllm.log", max_context=MAX_CONTEXT, adapters=served, rank=RANK) as server:
        streams.measure(setup.load(server, few, NUM_FEW))  # warm-up
        theirs = {num: setup.measure("vllm, 8 adapters", server, few, num) for num in NUM_STREAMS}
    for num in NUM_STREAMS:
        figures |= figures_of("ours_adapters8", f"c{num}", ours[num])
        figures |= figures_of("vllm_adapters8", f"c{num}", theirs[num])
        figures[f"adapters8_vs_vllm_c{num}"] = ours[num].tokens_per_s / theirs[num].tokens_per_s
        figures |= ttft_ratios("adapters8_", f"c{num}", ours[num], theirs[num])
    return figures


def hot_load(setup: Setup) -> dict[str, float]:
    """Adapters that are called for the first time while 32 streams of the base run.

    `adapter_load_ms` is the replica's own mean time from the first need of an adapter to its being resident, checks of
    every byte included. `adapter_load_extra_steps`: how much longer the longest pause of any stream was than that
    while as many short requests called a resident adapter, in usual pauses between two chunks.
    """
    folders = save_adapters(setup.model, setup.folder / "loaded", 1 + NUM_LOADS)
    names = [folder.name for folder in folders]
    with setup.ours() as service:
        server = service.server
        publish_adapters(service.home, "base", folders, names)
        _call(setup, server, names[:1])
        before = _swaps(server)
        running = streams.Running(
            setup.load(server, ["base"], LOADING_STREAMS, num_tokens=LOADING_TOKENS, num_requests=LOADING_STREAMS)
        )
        _await_metric(server, "engine_running_sequences", LOADING_STREAMS)
        usual = _window(setup, server, names[:1] * NUM_LOADS)
        loading = _window(setup, server, names[1:])
        result = running.result()
        seconds, num_swaps = (after - at for after, at in zip(_swaps(server, 1 + NUM_LOADS), before, strict=True))
    assert num_swaps == NUM_LOADS, num_swaps
    assert min(stream.text_at[-1] for stream in result.streams) > loading[1], "streams ended before the last load"
    step_s = statistics.median(pause for stream in result.streams for pause in stream.pauses_s(*usual))
    longest_s, longest_usual_s = (
        max(pause for stream in result.streams for pause in stream.pauses_s(*window)) for window in (loading, usual)
    )
    return {
        "adapter_load_ms": 1000 * seconds / num_swaps,
        "adapter_load_extra_steps": (longest_s - longest_usual_s) / step_s,
        "adapter_load_longest_pause_ms": 1000 * longest_s,
        "longest_pause_without_load_ms": 1000 * longest_usual_s,
        "usual_pause_ms": 1000 * step_s,
    }


def memory(setup: Setup) -> dict[str, float]:
    """1,000 names on the bytes of 100 adapters, each of which is one to the engine, in a replica with room for 100.

    `adapter_memory_vs_weights`: growth of the replica per resident adapter over the size of an adapter's file;
    `adapter_churn_vs_weights`: growth from when 100 were resident until all 1,000 had answered, over those 100's size.
    """
    folders = save_adapters(setup.model, setup.folder / "resident", NUM_RESIDENT)
    names = [f"registered-{i}" for i in range(NUM_REGISTERED)]
    num_first = NUM_FEW  # what the first ones make the process hold for good is not theirs
    with setup.ours(max_resident_adapters=NUM_RESIDENT) as service:
        server = service.server
        publish_adapters(service.home, "base", folders, names)
        _call(setup, server, names[:num_first])
        at_first = _replica_bytes(server)
        _call(setup, server, names[num_first:NUM_RESIDENT])
        _await_metric(server, "engine_resident_adapters", NUM_RESIDENT)
        at_resident = _replica_bytes(server)
        _call(setup, server, names[NUM_RESIDENT:])
        at_end = _replica_bytes(server)
        _await_metric(server, "engine_resident_adapters", NUM_RESIDENT)  # not while one takes another's place
        num_resident = _metric(server, "engine_resident_adapters")
    weights = (folders[0] / "adapter_model.safetensors").stat().st_size
    return {
        "num_adapters_registered": NUM_REGISTERED,
        "num_adapters_resident": num_resident,
        "adapter_megabytes": weights / 1e6,
        "adapter_memory_vs_weights": (at_resident - at_first) / (NUM_RESIDENT - num_first) / weights,
        "adapter_churn_vs_weights": (at_end - at_resident) / NUM_RESIDENT / weights,
    }


def _call(setup: Setup, server: Server, models: Sequence[str]) -> None:
    """One short answer of each, one after another, to a prompt that is too short to be kept: what the engine keeps of
    prompts, up to a bound, is not the adapters' memory."""
    load = setup.load(server, models, 1, num_prompt_tokens=24, num_tokens=1, num_requests=len(models))
    streams.measure(load)


def _window(setup: Setup, server: Server, models: Sequence[str]) -> tuple[float, float]:
    """Call the models; when that began and ended, the client's own start left out."""
    load = setup.load(server, models, 1, num_tokens=1, num_requests=len(models))
    calls = streams.measure(load).streams
    return calls[0].sent_at, calls[-1].text_at[-1]


def _metric(server: Server, name: str) -> float:
    """Sum over all label values of a metric of ours."""
    text = httpx2.get(
        f"{server.url.removesuffix('/v1')}/metrics", headers={"Authorization": f"Bearer {server.key}"}
    ).text
    lines = [line for line in text.splitlines() if line.startswith(f"tunesmith_{name}{{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def _await_metric(server: Server, name: str, least: float) -> None:
    """Metrics of replicas reach a gateway within a second or so."""
    deadline = time.monotonic() + METRICS_TIMEOUT_S
    while _metric(server, name) < least:
        assert time.monotonic() < deadline, f"{name} stays at {_metric(server, name)}, below {least}"
        time.sleep(0.1)


def _swaps(server: Server, least: int = 1) -> tuple[float, float]:
    """Seconds and number of first uses of adapters, once so many are known."""
    _await_metric(server, "swap_seconds_count", least)
    return _metric(server, "swap_seconds_sum"), _metric(server, "swap_seconds_count")


def _replica_bytes(server: Server) -> int:
    """Resident memory of the one engine replica."""
    (replica,) = [
        process
        for process in psutil.Process(server.pid).children(recursive=True)
        if ENGINE_DEPLOYMENT in " ".join(process.cmdline()[:1])
    ]
    return int(replica.memory_info().rss)
