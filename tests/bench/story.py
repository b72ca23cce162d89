"""The whole story, timed: start, create, train, publish, chat; and the gateway beside a bare one."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from openai import OpenAI

from service.settings import Settings
from service.store import metrics
from service.store.database import Database
from tests.bench import streams
from tests.bench.servers import WITH_USAGE, add_base, free_port, tunesmith

GOALS = {
    "import_app_s": "without torch",
    "gateway_ready_s": "<= 15",
    "create_job_p50_ms": "<= 30",
    "post_to_first_step_s": "<= 15",
    "last_step_to_first_token_s": "<= 3",
    "step_to_event_s": "<= 1",
    "echo_vs_bare": ">= 0.95",
}
TOKEN_INTERVAL_MS = 20.0


def run() -> dict[str, float]:
    """All figures of the story."""
    figures = {"import_app_s": _import_app()}
    with tempfile.TemporaryDirectory() as home, _up(Path(home), figures) as client:
        add_base(client, "starter", "starter")
        figures["create_job_p50_ms"] = _create_job_p50_ms(client)
        figures |= _train_and_chat(client, Path(home))
    figures |= _echo_vs_bare()
    return figures


def _import_app() -> float:
    code = "import sys, service.app; assert 'torch' not in sys.modules, 'service.app imports torch'"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


@contextmanager
def _up(home: Path, figures: dict[str, float]) -> Iterator[OpenAI]:
    """`tunesmith up`, timed until the gateway is ready."""
    with tunesmith(home) as server:
        figures["gateway_ready_s"] = server.ready_s
        yield server.client()


def _upload(client: OpenAI) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(64)
    ]
    data = "\n".join(json.dumps(row) for row in rows).encode()
    file = client.files.create(file=("rows.jsonl", data), purpose="fine-tune")
    client.files.wait_for_processing(file.id, poll_interval=0.2)
    return file.id


def _create_job_p50_ms(client: OpenAI, num: int = 40) -> float:
    """Time of the POST alone; each job is cancelled at once."""
    file_id, times = _upload(client), []
    for i in range(num):
        started = time.perf_counter()
        job = client.fine_tuning.jobs.create(model="starter", training_file=file_id, seed=i)
        times.append(time.perf_counter() - started)
        client.fine_tuning.jobs.cancel(job.id)
    return statistics.median(times) * 1000


def _train_and_chat(client: OpenAI, home: Path) -> dict[str, float]:
    """One LoRA job on a warm cluster, watched through the API by a client that is not told anything else."""
    file_id = _upload(client)
    _warm_up(client, file_id)
    _ask(client, "starter")
    posted = time.time()
    hyperparameters = {"n_epochs": 4, "batch_size": 8}
    job = client.fine_tuning.jobs.create(
        model="starter",
        training_file=file_id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
    )
    seen = _follow(client, job.id)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded" and job.fine_tuned_model, job
    _ask(client, job.fine_tuned_model)
    first_token = time.time()
    db = Database(f"sqlite:///{home / 'tunesmith.db'}")
    with db.read() as tx:
        done = {row.step: row.at for row in metrics.merged(tx, job.id, "step")}
    db.close()
    return {
        "post_to_first_step_s": min(done.values()) - posted,
        "last_step_to_first_token_s": first_token - max(done.values()),
        "step_to_event_s": statistics.median(seen[step] - at for step, at in done.items()),
        "step_to_event_max_s": max(seen[step] - at for step, at in done.items()),
    }


def _warm_up(client: OpenAI, file_id: str) -> None:
    """A first job, so that the measured one meets a warm cluster."""
    hyperparameters = {"n_epochs": 1, "batch_size": 64}
    job = client.fine_tuning.jobs.create(
        model="starter",
        training_file=file_id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
    )
    _follow(client, job.id)
    time.sleep(8)  # until Ray has given back what the first run held; not part of any figure


def _follow(client: OpenAI, job_id: str) -> dict[int, float]:
    """When each step's event arrived over SSE, until the job is over."""
    seen: dict[int, float] = {}
    headers = {"Authorization": f"Bearer {client.api_key}"}
    url = f"{client.base_url}fine_tuning/jobs/{job_id}/events?stream=true"
    with httpx2.stream("GET", url, headers=headers, timeout=None) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                step = (event.get("data") or {}).get("step")
                if event.get("type") == "metrics" and step is not None:
                    seen.setdefault(step, time.time())
            if line.startswith("data: [DONE]"):
                break
    return seen


def _ask(client: OpenAI, model: str) -> None:
    """Returns at the first token of a streamed answer."""
    messages = [{"role": "user", "content": "What is 7?"}]
    stream = client.chat.completions.create(model=model, messages=messages, stream=True, max_tokens=4)  # type: ignore[call-overload]
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            break
    stream.close()


def _echo_vs_bare() -> dict[str, float]:
    """Our gateway with the echo engine against the bare one, turn by turn in one Serve; and ours behind HAProxy."""
    plain, behind_haproxy = _gateways(use_haproxy=False), _gateways(use_haproxy=True)
    return {
        "echo_vs_bare": plain["echo"].tokens_per_s / plain["bare"].tokens_per_s,
        "echo_tokens_per_s": plain["echo"].tokens_per_s,
        "bare_tokens_per_s": plain["bare"].tokens_per_s,
        "echo_ttft_p50_s": plain["echo"].ttft_s(50),
        "bare_ttft_p50_s": plain["bare"].ttft_s(50),
        "haproxy_echo_vs_bare": behind_haproxy["echo"].tokens_per_s / behind_haproxy["bare"].tokens_per_s,
        "haproxy_vs_proxy": behind_haproxy["echo"].tokens_per_s / plain["echo"].tokens_per_s,
        "haproxy_echo_ttft_p50_s": behind_haproxy["echo"].ttft_s(50),
    }


def _gateways(*, use_haproxy: bool, num_rounds: int = 3) -> dict[str, streams.Result]:
    """The round with the median speed of each gateway, both in one Serve."""
    from service.up import running_service
    from tests.bench import bare

    with tempfile.TemporaryDirectory() as home:
        settings = Settings(
            home=Path(home),
            port=free_port(),
            engine="echo",
            echo_token_interval_ms=TOKEN_INTERVAL_MS,
            ray_address="",
            use_haproxy=use_haproxy,
        )
        with running_service(settings) as service:
            add_base(OpenAI(base_url=service.url, api_key=service.admin_key), "starter", "starter")
            route = bare.deploy(TOKEN_INTERVAL_MS / 1000)
            loads = {
                "bare": streams.Load(service.url.removesuffix("/v1") + route, "", 32, _chats("bare")),
                "echo": streams.Load(service.url + "/chat/completions", service.admin_key, 32, _chats("starter")),
            }
            results: dict[str, list[streams.Result]] = {name: [] for name in loads}
            for load in loads.values():
                streams.measure(load)  # warm-up
            for _ in range(num_rounds):
                for name, load in loads.items():
                    results[name].append(streams.measure(load))
    return {name: sorted(found, key=lambda r: r.tokens_per_s)[num_rounds // 2] for name, found in results.items()}


def _chats(model: str, num: int = 32, num_tokens: int = 200) -> list[dict[str, Any]]:
    """Requests whose prompts have one token a word, so that they fit a small context."""
    messages = [{"role": "user", "content": " ".join(["a"] * num_tokens)}]
    return [{"model": model, "messages": messages, "max_tokens": num_tokens, "stream": True, **WITH_USAGE}] * num
