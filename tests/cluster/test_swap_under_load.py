"""The model behind a name is swapped under load without one failed request."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from tests.cluster.conftest import await_job
from tests.cluster.curves import create_job

pytestmark = pytest.mark.long

NUM_CLIENTS = 6
NUM_ROUNDS = 5


def load(client: OpenAI, stop: threading.Event) -> int:
    """Stream completions until told to stop; returns how many were whole. Any failure is raised: nothing is retried."""
    num_whole = 0
    while not stop.is_set():
        stream = client.completions.create(model="storyteller", prompt="Once upon", max_tokens=12, stream=True)
        reasons = [choice.finish_reason for chunk in stream for choice in chunk.choices if choice.finish_reason]
        assert reasons in (["length"], ["stop"])
        num_whole += 1
    return num_whole


def test_an_alias_moves_between_fresh_adapters_while_streams_run(client: OpenAI) -> None:
    job_id = create_job(client)
    job = await_job(client, job_id)
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job_id).data
    versions = ["stories", job.fine_tuned_model or "", *(c.fine_tuned_model_checkpoint for c in checkpoints)]
    assert len(set(versions)) >= 4, "several adapters, each loaded for the first time under load"
    client.put("/aliases/storyteller", body={"model": "stories"}, cast_to=object)
    stop = threading.Event()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        loads = [pool.submit(load, client, stop) for _ in range(NUM_CLIENTS)]
        try:
            for version in versions * NUM_ROUNDS:
                client.put("/aliases/storyteller", body={"model": version}, cast_to=object)
                answer = client.completions.create(model="storyteller", prompt="Once upon", max_tokens=2)
                assert answer.model == version, "a request after the move sees the new model"
        finally:
            stop.set()
        num_whole = [running.result(timeout=60) for running in loads]
    assert min(num_whole) > 0
