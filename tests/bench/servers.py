"""Servers to measure, each a process of its own that is started for its measurements and ends after them.

All get the same number of threads, a CPU core each, and nothing else of them is tuned but what their documentation
tells every user to set.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx2
import psutil
from openai import OpenAI

from tests.bench.processes import ROOT
from tests.shared import TUNESMITH

NUM_THREADS = len(os.sched_getaffinity(0))
VLLM = ROOT / ".peers/vllm/bin/python"
VLLM_SERVER = "vllm.entrypoints.launchers.api_server.entry"  # the `vllm` command wants metadata that the wheel lacks
CACHE_GIB = 4  # of keys and values, of each peer; several times what any load here needs
START_TIMEOUT_S = 600.0  # vLLM compiles for minutes on a busy machine
WITH_USAGE = {"stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str  # ends in /v1
    key: str
    ready_s: float  # from its start to its first healthy answer
    pid: int
    body: dict[str, Any] = field(default_factory=lambda: dict(WITH_USAGE))  # what its streams need to tell usage

    @property
    def chat_url(self) -> str:
        """The chat completions route."""
        return self.url + "/chat/completions"

    def client(self) -> OpenAI:
        """An ordinary client of it."""
        return OpenAI(base_url=self.url, api_key=self.key, timeout=300)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextmanager
def tunesmith(home: Path, **settings: object) -> Iterator[Server]:
    """`tunesmith up` as a user starts it."""
    port = free_port()
    values = {"home": home, "port": port, **settings}
    environment = os.environ | {f"TUNESMITH_{name.upper()}": str(value) for name, value in values.items()}
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    process = subprocess.Popen([TUNESMITH, "up"], env=environment)
    try:
        _await_answer(url + "/readyz", process)
        ready_s = time.perf_counter() - started
        yield Server(url + "/v1", (home / "admin.key").read_text().strip(), ready_s, process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def add_base(client: OpenAI, base_id: str, source: str) -> None:
    """Register a base and wait until it is imported."""
    client.post("/bases", body={"id": base_id, "source": source}, cast_to=object)
    while True:
        base = client.get(f"/bases/{base_id}", cast_to=dict)  # type: ignore[type-var]
        if base["status"] != "preparing":
            assert base["status"] == "ready", base
            return
        time.sleep(0.5)


@contextmanager
def vllm(
    model: Path, log: Path, *, max_context: int, adapters: dict[str, Path] | None = None, rank: int = 0
) -> Iterator[Server]:
    """vLLM's OpenAI server; the base is called `base`, the adapters, of one rank, by their names."""
    port = free_port()
    command = [str(VLLM), "-m", VLLM_SERVER, "--model", str(model), "--served-model-name", "base"]
    command += ["--dtype", "bfloat16", "--max-model-len", str(max_context), "--port", str(port)]
    command += ["--disable-uvicorn-access-log"]
    if adapters:
        command += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(rank)]
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    with _process(command, f"http://127.0.0.1:{port}/health", log, vllm_environment()) as (pid, ready_s):
        yield Server(f"http://127.0.0.1:{port}/v1", "-", ready_s, pid)


def vllm_environment() -> dict[str, str]:
    """One thread a core, and the size of the cache of keys and values, which vLLM asks every user of a CPU to set."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB), "VLLM_NO_USAGE_STATS": "1"}


@contextmanager
def transformers(model: Path, log: Path) -> Iterator[Server]:
    """`transformers serve` with continuous batching, from our own environment; it tells usage without being asked."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--continuous-batching"]
    command += ["--dtype", "bfloat16", "--device", "cpu", "--port", str(port), "--log-level", "error"]
    share = CACHE_GIB * 2**30 / psutil.virtual_memory().available
    command += ["--cb-max-memory-percent", f"{min(0.6, share):.3f}"]  # 0.6 is its own default on a CPU
    with _process(command, f"http://localhost:{port}/health", log, {}) as (pid, ready_s):
        yield Server(f"http://localhost:{port}/v1", "-", ready_s, pid, body={})


@contextmanager
def _process(command: list[str], health: str, log: Path, environment: dict[str, str]) -> Iterator[tuple[int, float]]:
    """A peer's server until the end of the block; its process id, and the seconds until it was healthy."""
    started = time.perf_counter()
    with log.open("w") as output, own_group(command, environment, output, output) as process:
        _await_answer(health, process, log)
        yield process.pid, time.perf_counter() - started


@contextmanager
def own_group(
    command: list[str], environment: dict[str, str], output: int | IO[str], errors: int | IO[str]
) -> Iterator[subprocess.Popen[str]]:
    """A process with a thread per core and its children, all of which end with the block."""
    common = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(NUM_THREADS)}
    process = subprocess.Popen(
        command,
        env=os.environ | common | environment,
        cwd=ROOT,
        stdout=output,
        stderr=errors,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # children that outlived it
        process.wait()


def last_figures(command: list[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    """Run a script that prints its figures as a JSON object; RuntimeError with the end of what it said if it fails."""
    with own_group(command, environment or {}, subprocess.PIPE, subprocess.PIPE) as process:
        output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command[:3]} failed:\n{output[-1000:]}\n{errors[-3000:]}")
    lines = [line for line in output.splitlines() if line.startswith("{")]  # vLLM goes on talking while it ends
    figures: dict[str, float] = json.loads(lines[-1])
    return figures


def _await_answer(url: str, process: subprocess.Popen[Any], log: Path | None = None) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx2.get(url, timeout=2).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.05)
    said = log.read_text()[-3000:] if log else ""
    raise RuntimeError(f"no answer at {url} (exit code {process.returncode})\n{said}")
