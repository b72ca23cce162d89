"""`tunesmith up` as a process: start, refuse a second one, stop, be killed, start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from openai import OpenAI

from tests.cluster.conftest import add_base, await_job, await_value, free_port
from tests.cluster.curves import create_job, last_step, losses
from tests.shared import MODELS

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
        self.log = (home.parent / "up.log").open("a+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "up"],
            env=os.environ | ENVIRONMENT | variables | environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        await_value(self.is_ready, f"`tunesmith up` ready, log {self.log.name}")
        key = (home / "admin.key").read_text().strip()
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, Path(self.log.name).read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
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
            [sys.executable, "-m", "service.cli", "up"],
            env=os.environ | {"TUNESMITH_HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        said = " ".join((second.stdout + second.stderr).split())
        assert second.returncode == 1
        assert "runs already" in said and str(up.port) in said and "Traceback" not in said


def test_haproxy_and_its_orphan(tmp_path: Path) -> None:
    """Killed hard, `up` leaves its HAProxy behind; the next start ends it and answers. A killed HAProxy is replaced."""
    home = tmp_path / "home"
    with running(home, TUNESMITH_USE_HAPROXY="true") as up:
        up.process.kill()
        up.process.wait()
    with running(home, TUNESMITH_USE_HAPROXY="true") as up:
        pids = [int(pid) for pid in (home / "haproxy.pid").read_text().split()]
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        await_value(lambda: not up.is_ready() or None, "the edge to be gone", 10)
        await_value(up.is_ready, "the edge to be back", 60)
