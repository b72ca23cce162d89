"""Every metric: name, labels, buckets; and how the numbers of many processes become one page.

Each process counts in a registry of its own and pushes snapshots to one hub. The page is the merged snapshot of all,
with counts from the database, so it means the same whichever gateway answers. The hub is reached through an object
that is passed in: an actor's handle on a cluster, the hub itself inside one process. Labels hold bases, not models:
the number of bases is small, that of models is not.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session

from service.jobs.states import JobState
from service.store import jobs, tasks

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PUSH_INTERVAL_S = 2.0
DEAD_AFTER_S = 15.0  # gauges of a process that was silent for so long no longer count
FOLD_AFTER_S = 3600.0  # and then its counters are kept as one sum

_FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_LOADS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})

SampleKey = tuple[str, tuple[tuple[str, str], ...]]


@dataclass
class Family:
    """One metric with its samples; values of `gauge` families belong to living processes only."""

    type: str
    documentation: str
    samples: dict[SampleKey, float] = field(default_factory=dict)


Snapshot = dict[str, Family]


class HubClient(Protocol):
    """The way from a process to the hub."""

    async def push(self, process_id: str, snapshot: Snapshot) -> None:
        """Replace what the hub knows of this process."""
        ...

    async def read(self) -> Snapshot:
        """The merged snapshot of all processes."""
        ...


class Metrics:
    """The metrics of one process. Observing is cheap and safe from any thread."""

    def __init__(self, hub: HubClient | None = None) -> None:
        """Without a hub the process renders only its own numbers."""
        self.process_id = uuid.uuid4().hex
        self.registry = CollectorRegistry()
        self._hub = hub if hub is not None else LocalHub(MetricsHub())
        by_base = ["base"]
        self._requests = self._counter("requests", "HTTP requests by route", ["route", "method", "status"])
        self._request_s = self._histogram("request_seconds", "Time to the last byte", ["route", "method"], _FAST)
        self._first_token_s = self._histogram("time_to_first_token_seconds", "Request to first token", by_base, _FAST)
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens read from prompts", by_base)
        self._cached_tokens = self._counter("cached_prompt_tokens", "Tokens of prompts not read anew", by_base)
        self._completion_tokens = self._counter("completion_tokens", "Tokens generated", by_base)
        self._running = self._gauge("engine_running_sequences", "Sequences being decoded", by_base)
        self._waiting = self._gauge("engine_waiting_sequences", "Sequences that wait for a place", by_base)
        self._preemptions = self._counter("engine_preemptions", "Times a sequence gave its place up", by_base)
        self._resident = self._gauge("engine_resident_adapters", "Adapters in memory, over all replicas", by_base)
        self._adapter_loads = self._counter("adapter_loads", "Adapters loaded into an engine", by_base)
        self._adapter_load_s = self._histogram("adapter_load_seconds", "Loading an adapter", by_base, _LOADS)
        self._swap_s = self._histogram("swap_seconds", "Fetch, verify and load of a model's first use", by_base, _LOADS)
        self._training_tokens = self._counter("training_tokens", "Tokens trained on", [])
        self._training_speed = self._gauge("training_tokens_per_second", "Speed of all runs together", [])

    def observe_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """One HTTP request; `route` is the path's pattern, never the path itself."""
        method = method if method in _METHODS else "other"  # a client may send any word
        self._requests.labels(route, method, str(status)).inc()
        self._request_s.labels(route, method).observe(seconds)

    def observe_first_token(self, base_id: str, seconds: float) -> None:
        """Time from the request's arrival to its first token."""
        self._first_token_s.labels(base_id).observe(seconds)

    def add_tokens(self, base_id: str, *, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> None:
        """Tokens of one request, also of one that was broken off; the cached ones are among those of the prompt."""
        self._prompt_tokens.labels(base_id).inc(prompt_tokens)
        self._cached_tokens.labels(base_id).inc(cached_tokens)
        self._completion_tokens.labels(base_id).inc(completion_tokens)

    def set_engine(self, base_id: str, num_running: int, num_waiting: int, num_resident_adapters: int) -> None:
        """State of this process's engine."""
        self._running.labels(base_id).set(num_running)
        self._waiting.labels(base_id).set(num_waiting)
        self._resident.labels(base_id).set(num_resident_adapters)

    def add_preemptions(self, base_id: str, num: int) -> None:
        """Sequences that gave their place in a full cache up, to go on later."""
        self._preemptions.labels(base_id).inc(num)

    def observe_adapter_load(self, base_id: str, seconds: float) -> None:
        """One adapter loaded by the engine."""
        self._adapter_loads.labels(base_id).inc()
        self._adapter_load_s.labels(base_id).observe(seconds)

    def observe_swap(self, base_id: str, seconds: float) -> None:
        """From the first need of an adapter on a replica to its being resident there."""
        self._swap_s.labels(base_id).observe(seconds)

    def observe_training(self, num_tokens: int, tokens_per_s: float) -> None:
        """One optimizer step of this process's run; set the speed to 0 when the run ends."""
        self._training_tokens.inc(num_tokens)
        self._training_speed.set(tokens_per_s)

    def snapshot(self) -> Snapshot:
        """This process's numbers as plain, picklable data."""
        return _collect(self.registry.collect())

    async def push(self) -> None:
        """Send a snapshot to the hub. What the client raises is raised: the caller knows whether that matters."""
        await self._hub.push(self.process_id, self.snapshot())

    @asynccontextmanager
    async def pushing(self) -> AsyncIterator[None]:
        """Push every few seconds within the block, and once more at its end."""
        task = asyncio.create_task(self._push_forever())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
            await self.push()

    async def _push_forever(self) -> None:
        while True:
            await self.push()
            await asyncio.sleep(PUSH_INTERVAL_S)

    async def render(self, extra: Iterable[Metric] = ()) -> bytes:
        """The page: all processes' numbers, this one's up to the moment, and the families given."""
        await self.push()
        merged = await self._hub.read()
        registry = CollectorRegistry()
        registry.register(_Fixed([*_families(merged), *extra]))
        return generate_latest(registry)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"tunesmith_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(f"tunesmith_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"tunesmith_{name}", text, labels, buckets=buckets, registry=self.registry)


class MetricsHub:
    """Merges snapshots. Counters and histograms of dead processes keep counting, their gauges do not.

    Lives in one process; when that one is replaced, living processes push all they have again, and the counts of dead
    ones are lost: to Prometheus that is an ordinary counter reset.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._latest: dict[str, tuple[float, Snapshot]] = {}
        self._folded: Snapshot = {}

    def push_metrics(self, process_id: str, snapshot: Snapshot) -> None:
        """Replace what is known of a process."""
        self._latest[process_id] = (self._clock(), snapshot)

    def read_metrics(self) -> Snapshot:
        """The sum over all processes."""
        self._fold()
        merged: Snapshot = {}
        _add(merged, self._folded, with_gauges=False)
        for at, snapshot in self._latest.values():
            _add(merged, snapshot, with_gauges=self._clock() - at <= DEAD_AFTER_S)
        return merged

    def _fold(self) -> None:
        """Keep memory bounded over months: long silent processes become part of one sum."""
        old = [name for name, (at, _) in self._latest.items() if self._clock() - at > FOLD_AFTER_S]
        for name in old:
            _add(self._folded, self._latest.pop(name)[1], with_gauges=False)


class LocalHub:
    """A hub in this process."""

    def __init__(self, hub: MetricsHub) -> None:
        self.hub = hub

    async def push(self, process_id: str, snapshot: Snapshot) -> None:
        """Replace what the hub knows of this process."""
        self.hub.push_metrics(process_id, snapshot)

    async def read(self) -> Snapshot:
        """The merged snapshot of all processes."""
        return self.hub.read_metrics()


class ActorHub:
    """A hub in an actor with the methods `push_metrics` and `read_metrics`; the handle is looked up when it is needed.

    While the actor is away, this process's last snapshot stands in for the whole: `/metrics` never fails for it.
    """

    def __init__(self, get_actor: Callable[[], Awaitable[Any]]) -> None:
        self._get_actor = get_actor
        self._own = MetricsHub()

    async def push(self, process_id: str, snapshot: Snapshot) -> None:
        """Replace what the hub knows of this process."""
        self._own.push_metrics(process_id, snapshot)
        try:
            actor = await self._get_actor()
            await actor.push_metrics.remote(process_id, snapshot)
        except Exception:  # a process edge: whatever ails the actor, numbers wait for the next push
            return

    async def read(self) -> Snapshot:
        """The merged snapshot of all processes."""
        try:
            actor = await self._get_actor()
            merged: Snapshot = await actor.read_metrics.remote()
            return merged
        except Exception:  # a process edge: a page with fewer numbers is better than none
            return self._own.read_metrics()


def database_metrics(tx: Session) -> list[Metric]:
    """Numbers that the database knows best: jobs by state, the queue, open tasks."""
    counts = jobs.count_by_state(tx)
    by_state = GaugeMetricFamily("tunesmith_jobs", "Fine-tuning jobs by state", labels=["state"])
    for state in JobState:
        by_state.add_metric([state], counts.get(state, 0))
    depth = counts.get(JobState.QUEUED, 0)
    return [
        by_state,
        GaugeMetricFamily("tunesmith_queue_depth", "Jobs that wait for resources", value=depth),
        GaugeMetricFamily("tunesmith_open_tasks", "Background tasks queued or at work", value=tasks.num_open(tx)),
    ]


class _Fixed(Collector):
    """Families as they are."""

    def __init__(self, families: list[Metric]) -> None:
        self._all = families

    def collect(self) -> Iterable[Metric]:
        return self._all


def _collect(families: Iterable[Metric]) -> Snapshot:
    snapshot: Snapshot = {}
    for family in families:
        kept = Family(family.type, family.documentation)
        for sample in family.samples:
            if not sample.name.endswith("_created"):  # a moment cannot be summed
                kept.samples[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        snapshot[family.name] = kept
    return snapshot


def _add(into: Snapshot, more: Snapshot, *, with_gauges: bool) -> None:
    for name, family in more.items():
        if family.type == "gauge" and not with_gauges:
            continue
        sums = into.setdefault(name, Family(family.type, family.documentation)).samples
        for key, value in family.samples.items():
            sums[key] = sums.get(key, 0.0) + value


def _families(snapshot: Snapshot) -> Iterable[Metric]:
    for name, family in sorted(snapshot.items()):
        metric = (
            CounterMetricFamily(name, family.documentation)
            if family.type == "counter"
            else Metric(name, family.documentation, family.type)
        )
        for (sample_name, labels), value in family.samples.items():
            metric.add_sample(sample_name, dict(labels), value)
        yield metric
