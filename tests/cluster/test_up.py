"""`tunesmith up` as a process: start, refuse a second one, stop, be killed, start again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest
from openai import OpenAI
from ray.cluster_utils import Cluster

from tests.cluster.conftest import add_base, await_job, await_value, free_port
from tests.cluster.curves import create_job, last_step, losses
from tests.shared import MODELS, TUNESMITH

pytestmark = pytest.mark.long

ENVIRONMENT = {
    "TUNESMITH_GATEWAY_NUM_CPUS": "0.05",
    "TUNESMITH_ENGINE_NUM_CPUS": "0.1",
    "TUNESMITH_TRAIN_NUM_CPUS": "0.4",
    "TUNESMITH_TRAIN_NUM_THREADS": "1",
    "TUNESMITH_HEARTBEAT_TIMEOUT_S": "10",
}


class Up:
    """One `tunesmith up` process and a client for it."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.port = free_port()
        variables = {"TUNESMITH_HOME": str(home), "TUNESMITH_PORT": str(self.port)}
        self.home = home
        self.log = (home.parent / "up.log").open("a+")
        self.process = subprocess.Popen(
            [TUNESMITH, "up"],
            env=os.environ | ENVIRONMENT | variables | environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.url: str = await_value(self._url, f"`tunesmith up` ready, log {self.log.name}")
        key = (home / "admin.key").read_text().strip()
        self.client = OpenAI(base_url=self.url, api_key=key, max_retries=0)

    def _url(self) -> str | None:
        """Where it answers, once it says so."""
        assert self.process.poll() is None, Path(self.log.name).read_text()
        state = self.home / "up.json"
        said = json.loads(state.read_text()) if state.exists() else {}
        return said["url"] if said.get("pid") == self.process.pid else None

    def is_ready(self) -> bool:
        """Whether the edge and a gateway behind it answer."""
        try:
            return httpx2.get(self.url.removesuffix("/v1") + "/readyz", timeout=5).status_code == 200
        except httpx2.HTTPError:
            return False

    def end(self, number: signal.Signals) -> None:
        """Signal the process and wait until nothing that it started is left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        self.process.wait(120)
        self.log.close()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not [process.cmdline() for process in alive]


@contextmanager
def running(home: Path, **environment: str) -> Iterator[Up]:
    up = Up(home, **environment)
    try:
        yield up
    finally:
        if up.process.poll() is None:
            up.end(signal.SIGINT)


def _start_job(up: Up) -> str:
    add_base(up.client, "stories", str(MODELS / "stories260K"))
    job_id = create_job(up.client)
    await_value(lambda: last_step(up.client, job_id) >= 6, "six steps")
    return job_id


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_job_survives_the_end_of_up(tmp_path: Path, number: signal.Signals) -> None:
    home = tmp_path / "home"
    with running(home) as up:
        job_id = _start_job(up)
        up.client.put("/aliases/teller", body={"model": "stories"}, cast_to=object)
        if number == signal.SIGINT:
            up.end(number)
        else:
            up.process.kill()
            up.process.wait()
    with running(home) as up:
        job = await_job(up.client, job_id)
        assert len(losses(up.client, job_id)) == 30
        for model in (job.fine_tuned_model or "", "teller"):
            assert up.client.completions.create(model=model, prompt="Once", max_tokens=4).choices[0].text


def test_a_second_up_on_the_same_home_says_so_and_stops(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with running(home) as up:
        second = subprocess.run(
            [TUNESMITH, "up"],
            env=os.environ | {"TUNESMITH_HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        said = " ".join((second.stdout + second.stderr).split())
        assert second.returncode == 1
        assert "runs already" in said and str(up.port) in said and "Traceback" not in said


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused = subprocess.run(
            [TUNESMITH, "up", "--home", str(tmp_path), "--port", str(port)], capture_output=True, text=True, timeout=60
        )
    said = " ".join((refused.stdout + refused.stderr).split())
    assert refused.returncode == 1
    assert str(port) in said and "--port" in said and "Traceback" not in said


def is_haproxy(process: psutil.Process, folder: str) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:  # it has ended
        return False
    return bool(words) and "haproxy" in words[0] and any(folder in word for word in words)


def test_haproxy_and_its_orphan(tmp_path: Path) -> None:
    """Killed hard, `up` leaves its HAProxy behind; the next start ends it and answers. A killed HAProxy is replaced."""
    home = tmp_path / "home"
    with running(home, TUNESMITH_USE_HAPROXY="true") as up:
        up.process.kill()
        up.process.wait()
    with running(home, TUNESMITH_USE_HAPROXY="true") as up:
        folder = json.loads((home / "haproxy.json").read_text())["folder"]
        edges = [process for process in psutil.process_iter() if is_haproxy(process, folder)]
        assert edges
        for edge in edges:
            edge.kill()
        await_value(lambda: not up.is_ready() or None, "the edge to be gone", 10)
        await_value(up.is_ready, "the edge to be back", 60)


OTHER_APP = """
import ray, sys
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Other:
    def __call__(self) -> str:
        return "other"

ray.init(address=sys.argv[1], log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(Other.bind(), name="other", route_prefix="/")
"""

LEFT_BEHIND = """
import json, ray, sys
from ray import serve
from ray.util import list_named_actors

ray.init(address=sys.argv[1], log_to_driver=False)
actors = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
print(json.dumps({"apps": list(serve.status().applications), "actors": actors}))
"""


def _instance_id(up: Up) -> str:
    return up.url.split("tunesmith-")[1].split("/")[0]


def test_on_a_joined_cluster_it_touches_only_its_own(tmp_path: Path, cluster: Cluster) -> None:
    port = free_port()
    subprocess.run([sys.executable, "-c", OTHER_APP, cluster.address, str(port)], check=True, timeout=120)
    other = f"http://127.0.0.1:{port}/"
    with running(tmp_path / "home", RAY_ADDRESS=cluster.address) as up:
        assert up.url.startswith(f"{other}tunesmith-"), "the route of the other app must stay free"
        add_base(up.client, "stories", str(MODELS / "stories260K"))
        assert up.client.completions.create(model="stories", prompt="Once", max_tokens=4).choices[0].text
        assert httpx2.get(other).text == "other"
        name = f"tunesmith-{_instance_id(up)}"
    left = json.loads(subprocess.check_output([sys.executable, "-c", LEFT_BEHIND, cluster.address], timeout=60))
    assert left["apps"] == ["other"]
    assert not [actor for actor in left["actors"] if name in actor]
    assert httpx2.get(other).text == "other"


def test_a_second_node_is_refused_while_state_lies_on_one_disk(tmp_path: Path, cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1)
    refused = subprocess.run(
        [TUNESMITH, "up"],
        env=os.environ | {"TUNESMITH_HOME": str(tmp_path / "home"), "RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = refused.stdout + refused.stderr
    assert refused.returncode == 1
    assert "TUNESMITH_DATABASE_URL" in said and "Traceback" not in said
