"""/metrics: valid Prometheus text, the same whichever process answers, right when processes come and go."""

from __future__ import annotations

import pickle

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import DEAD_AFTER_S, FOLD_AFTER_S, LocalHub, Metrics, MetricsHub
from tests.api.live import ECHO, live_service, sync_client


class Clock:
    """Time that tests move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def samples(page: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample of a page by name and label values."""
    families = text_string_to_metric_families(page.decode())
    return {(s.name, tuple(v for _, v in sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_the_page_of_a_service_tells_what_happened(tmp_path_factory: pytest.TempPathFactory) -> None:
    with live_service(tmp_path_factory.mktemp("metrics")) as (_, url, secret), sync_client(url, secret) as client:
        answer = client.chat.completions.create(model=ECHO, messages=[{"role": "user", "content": "Hi"}])
        page = client._client.get(url.removesuffix("/v1") + "/metrics", headers={"authorization": f"Bearer {secret}"})
    found = samples(page.content)
    assert answer.usage is not None
    assert found["tunesmith_requests_total", ("POST", "/v1/chat/completions", "200")] == 1
    assert found["tunesmith_request_seconds_count", ("POST", "/v1/chat/completions")] == 1
    assert found["tunesmith_time_to_first_token_seconds_count", (ECHO,)] == 1
    assert found["tunesmith_prompt_tokens_total", (ECHO,)] == answer.usage.prompt_tokens
    assert found["tunesmith_completion_tokens_total", (ECHO,)] == answer.usage.completion_tokens
    assert found["tunesmith_jobs", ("succeeded",)] == 0
    assert found["tunesmith_queue_depth", ()] == 0


async def test_every_process_renders_the_sum_of_all() -> None:
    hub = MetricsHub()
    processes = [Metrics(LocalHub(hub)) for _ in range(3)]
    for number, metrics in enumerate(processes):
        metrics.add_tokens("base", prompt_tokens=10, completion_tokens=number)
        metrics.set_engine("base", num_running=2, num_waiting=0, num_resident_adapters=1)
        metrics.observe_request("/v1/x", "GET", 200, 0.02)
        await metrics.push()
    pages = [await metrics.render() for metrics in processes]
    assert pages[0] == pages[1] == pages[2]
    found = samples(pages[0])
    assert found["tunesmith_prompt_tokens_total", ("base",)] == 30
    assert found["tunesmith_completion_tokens_total", ("base",)] == 3
    assert found["tunesmith_engine_running_sequences", ("base",)] == 6
    assert found["tunesmith_request_seconds_bucket", ("0.025", "GET", "/v1/x")] == 3


async def test_gauges_of_a_dead_process_go_and_its_counters_stay() -> None:
    clock = Clock()
    hub = MetricsHub(clock)
    dead, alive = Metrics(LocalHub(hub)), Metrics(LocalHub(hub))
    for metrics in (dead, alive):
        metrics.add_tokens("base", prompt_tokens=1, completion_tokens=1)
        metrics.set_engine("base", num_running=1, num_waiting=0, num_resident_adapters=0)
        await metrics.push()
    for waited_s in (DEAD_AFTER_S + 1, FOLD_AFTER_S + 1):
        clock.now += waited_s
        found = samples(await alive.render())
        assert found["tunesmith_engine_running_sequences", ("base",)] == 1
        assert found["tunesmith_prompt_tokens_total", ("base",)] == 2


async def test_a_new_hub_learns_all_from_the_living() -> None:
    metrics = Metrics(LocalHub(MetricsHub()))
    metrics.observe_training(100, 50.0)
    fresh = LocalHub(MetricsHub())
    await fresh.push(metrics.process_id, pickle.loads(pickle.dumps(metrics.snapshot())))
    assert (await fresh.read())["tunesmith_training_tokens"].samples["tunesmith_training_tokens_total", ()] == 100


async def test_odd_methods_do_not_grow_the_page() -> None:
    metrics = Metrics()
    for number in range(50):
        metrics.observe_request("unmatched", f"M{number}", 405, 0.0)
    found = samples(await metrics.render())
    assert found["tunesmith_requests_total", ("other", "unmatched", "405")] == 50
