"""`tunesmith demo`: the whole story on one machine, through the public API and the ordinary `openai` client.

Builds the starter base, teaches it the answers of `demo_data/lumora.jsonl`, and asks base and tuned model the same
questions. It succeeds only if the tuned answers are the taught ones.
"""

from __future__ import annotations

import json
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import openai
from rich.markup import escape

from service.cli import jobs, registry
from service.cli.client import console
from service.settings import Settings
from service.up import UpError, running_service

DATA = Path(__file__).parent / "demo_data" / "lumora.jsonl"
BASE = "starter"
NUM_QUESTIONS = 4
HYPERPARAMETERS = {"n_epochs": 25, "batch_size": 8, "learning_rate": 5e-3}
RANK = 16
_INTERRUPTED = 130  # the exit code of Ctrl-C
METHOD: Any = {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}}


def run_demo(home: Path | None, port: int | None) -> int:
    """Run it all; returns the exit code."""
    with _home(home) as folder:
        settings = Settings(home=folder, port=port or _free_port(), ray_address="", engine_num_cpus=0.4)
        console.print("Starting Ray and the service …")
        try:
            with running_service(settings) as service, _insisting():
                console.print(f"Ready at {service.url}")
                with openai.OpenAI(base_url=service.url, api_key=service.admin_key) as client:
                    return _story(client)
        except UpError as error:
            console.print(f"[red]Error:[/] {escape(str(error))}")
            return 1


@contextmanager
def _home(home: Path | None) -> Iterator[Path]:
    if home is not None:
        yield home
        return
    with tempfile.TemporaryDirectory(prefix="tunesmith-demo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def _insisting() -> Iterator[None]:
    """Ctrl-C ends the block. Python drops an exception that comes up within a callback, such as a destructor's, so the
    interrupt is raised again every second until the block is left."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGINT, before)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _story(client: openai.OpenAI) -> int:
    """File, job, model, chat."""
    if BASE not in {model.id for model in client.models.list()} and (
        code := registry.add_base(client, BASE, BASE, None)
    ):
        return code
    training_file = jobs.upload(client, DATA)
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=training_file,
        suffix="lumora",
        method=METHOD,
        extra_body={"adapter": {"type": "lora", "rank": RANK}},
    )
    if jobs.watch(client, job.id):
        return 1
    model = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    return _INTERRUPTED if model is None else _compare(client, model)  # Ctrl-C ends the watching


def _compare(client: openai.OpenAI, model: str) -> int:
    """The same questions to both; 0 if every tuned answer is the taught one."""
    rows = [json.loads(line)["messages"] for line in DATA.read_text(encoding="utf-8").splitlines()]
    taught = {messages[0]["content"]: messages[1]["content"] for messages in rows}
    questions = list(taught)[:: max(1, len(taught) // NUM_QUESTIONS)][:NUM_QUESTIONS]
    num_right = 0
    for question in questions:
        console.print(f"\n[bold]{escape(question)}[/]")
        _answer(client, BASE, question)
        num_right += _answer(client, model, question) == taught[question]
    console.print(f"\n{num_right} of {len(questions)} answers of the tuned model are the taught ones.")
    return 0 if num_right == len(questions) else 1


def _answer(client: openai.OpenAI, model: str, question: str) -> str:
    """Stream one greedy answer to the terminal and return it."""
    console.print(f"  [cyan]{escape(model)}[/]: ", end="", soft_wrap=True)
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=80,
        stream=True,
    )
    parts: list[str] = []
    for chunk in stream:
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            parts.append(text)
            console.out(text, end="", highlight=False)
    console.out("")
    return "".join(parts)
