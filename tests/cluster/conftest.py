"""One real Ray and one running service for all tests of this folder, and small helpers around the real client."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from ray.cluster_utils import Cluster

from service.settings import Settings
from tests.shared import MODELS, SHARED

T = TypeVar("T")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs the cluster, and most of it the real models.

    Tests that start a Ray of their own come before those that share the session's: two at a time confuse each other.
    """
    items.sort(key=lambda item: "service" in getattr(item, "fixturenames", ()))
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.skipif(not SHARED.is_dir(), reason="the real models are absent"))


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def cluster_settings(home: Path, **changes: Any) -> Settings:
    """Settings under which a 2-core machine runs several workers and engines at a time."""
    values: dict[str, Any] = {
        "home": home,
        "port": free_port(),
        "ray_address": "",
        "gateway_num_cpus": 0.05,
        "engine_num_cpus": 0.1,
        "engine_num_threads": 1,
        "train_num_cpus": 0.4,
        "train_num_threads": 1,
        "heartbeat_timeout_s": 20.0,
        "wandb_offline": True,
        "tensorboard_dir": str(home / "board") if find_spec("tensorboard") else "",
    }
    return Settings(**(values | changes))


def await_value(ask: Callable[[], T | None], what: str, timeout_s: float = 120.0) -> T:
    """Ask until the answer is not None (or False); AssertionError names what did not happen."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def await_job(client: OpenAI, job_id: str, *states: str, timeout_s: float = 180.0) -> FineTuningJob:
    """The job once it is in one of the states (default: any terminal one)."""
    wanted = states or ("succeeded", "failed", "cancelled")

    def ask() -> FineTuningJob | None:
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in wanted else None

    return await_value(ask, f"job {job_id} in {wanted}", timeout_s)


def add_base(client: OpenAI, base_id: str, source: str) -> None:
    """Register a base and wait until it can be used."""
    client.post("/bases", body={"id": base_id, "source": source}, cast_to=object)

    def ask() -> bool:
        base = client.get(f"/bases/{base_id}", cast_to=dict)  # type: ignore[type-var]
        assert base["status"] != "error", base
        return base["status"] == "ready"

    await_value(ask, f"base {base_id} ready")


def upload(client: OpenAI, rows: list[dict[str, Any]]) -> str:
    """Upload rows as a training file and wait until it is validated; returns its id."""
    data = "\n".join(json.dumps(row) for row in rows).encode()
    file = client.files.create(file=("rows.jsonl", data), purpose="fine-tune")
    file = client.files.wait_for_processing(file.id, poll_interval=0.1)
    assert file.status == "processed", file
    return file.id


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The running service, its Ray connected to this process."""
    from service.up import running_service

    with running_service(cluster_settings(tmp_path_factory.mktemp("home"))) as running:
        yield running


@pytest.fixture(scope="session")
def client(service: Any) -> Iterator[OpenAI]:
    """An ordinary client with the admin key; bases `stories` and `bot` are registered."""
    with OpenAI(base_url=service.url, api_key=service.admin_key, max_retries=0) as client:
        add_base(client, "stories", str(MODELS / "stories260K"))
        add_base(client, "bot", str(MODELS / "cardputer-chat"))
        yield client


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster that somebody else started."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True})
    yield cluster
    cluster.shutdown()
