"""Kill the orchestrator, a gateway, an engine replica: the service comes back and nothing is lost."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from openai import APIError, OpenAI

from tests.cluster.conftest import await_job, await_value
from tests.cluster.curves import create_job, last_step, losses
from tests.cluster.processes import cluster_pids, kill
from tests.cluster.test_story import ask

pytestmark = pytest.mark.long


def test_a_killed_orchestrator_comes_back_and_the_job_ends(client: OpenAI) -> None:
    job_id = create_job(client)
    await_value(lambda: last_step(client, job_id) >= 1, "first step")
    before = cluster_pids("ray::OrchestratorActor")
    assert kill("ray::OrchestratorActor")
    await_job(client, job_id)
    assert len(losses(client, job_id)) == 30
    after = cluster_pids("ray::OrchestratorActor")
    assert after and not set(after) & set(before)


def test_a_request_after_the_death_of_its_replica_is_answered(client: OpenAI) -> None:
    expected = ask(client, "bot")
    assert kill("ray::ServeReplica:") or kill("ray::ServeReplica")  # engines and gateway alike
    await_value(lambda: _answers(client), "the gateway to be back")
    assert ask(client.with_options(max_retries=2, timeout=60), "bot") == expected


def _answers(client: OpenAI) -> bool:
    try:
        return httpx2.get(str(client.base_url).removesuffix("/v1/") + "/healthz", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def test_a_stream_cut_by_a_killed_engine_ends_with_a_clear_error(client: OpenAI, service: Any) -> None:
    stream = client.chat.completions.create(
        model="bot", messages=[{"role": "user", "content": "Tell me more."}], stream=True, max_tokens=200, n=8
    )
    next(iter(stream))
    assert kill("ray::ServeReplica:" + _engine_app(service))
    with pytest.raises(APIError, match="send the request again"):
        list(stream)


def _engine_app(service: Any) -> str:
    return f"tunesmith-{service.instance_id}-engine"
