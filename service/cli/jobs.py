"""The commands around fine-tuning: create a job, watch it, look at it, steer it."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
from openai.types.fine_tuning import FineTuningJob
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from service.cli.client import console, errors, fail, get, post
from service.cli.registry import show, table, when
from service.cli.sweeps import OVER, show_trials

VALIDATION_POLL_S = 0.3
NUM_FAULTS_SHOWN = 10


@dataclass(frozen=True)
class TrainWishes:
    """The options of `tunesmith train`; None leaves a value to the service."""

    base_model: str
    method: str
    hyperparameters: dict[str, Any]
    suffix: str | None = None
    full: bool = False
    adapter: dict[str, Any] = field(default_factory=dict)
    workers: int | dict[str, int] = 1
    validation_split: float | None = None
    patience: int | None = None
    sample_prompts: list[str] | None = None
    sweep: dict[str, Any] | None = None
    fields: dict[tuple[str, ...], Any] = field(default_factory=dict)  # of the request, by path

    def body(self, training_file: str, validation_file: str | None) -> dict[str, Any]:
        """The create request."""
        hyperparameters = {name: value for name, value in self.hyperparameters.items() if value is not None}
        body: dict[str, Any] = {
            "model": self.base_model,
            "training_file": training_file,
            "method": {"type": self.method, self.method: {"hyperparameters": hyperparameters}},
            "num_workers": self.workers,
        }
        if self.full:
            body["adapter"] = {"type": "none"}
        elif self.adapter:
            body["adapter"] = {"type": "lora", **self.adapter}
        if self.patience is not None:
            body["early_stopping"] = {"patience": self.patience}
        extra = {
            "suffix": self.suffix,
            "validation_file": validation_file,
            "validation_split": self.validation_split,
            "sample_prompts": self.sample_prompts,
            "sweep": self.sweep,
        }
        body |= {name: value for name, value in extra.items() if value is not None}
        for (*path, name), value in self.fields.items():
            place = body["method"][self.method] if path[:1] == ["hyperparameters"] else body
            for part in path:
                place = place.setdefault(part, {})
                if not isinstance(place, dict):
                    fail(f"--set {'.'.join((*path, name))}: {part} has no fields.")
            place[name] = value
        return body


def parse_workers(option: str) -> int | dict[str, int]:
    """`--workers` as the request's `num_workers`; ValueError if it is neither a number nor a range."""
    least, dash, most = option.partition("-")
    return {"min": int(least), "max": int(most)} if dash else int(option)


def parse_fields(options: list[str]) -> dict[tuple[str, ...], Any]:
    """Each `--set` as a path into the request, whose `hyperparameters` are the method's, and a value: JSON, or else a
    text. ValueError if it is neither."""
    fields = {}
    for option in options:
        name, equals, text = option.partition("=")
        path = tuple(name.split("."))
        if not equals or not all(path):
            raise ValueError(f"--set {option}: give NAME=VALUE, such as keep_checkpoints=5.")
        try:
            fields[path] = json.loads(text, parse_constant=str, parse_float=_finite)  # NaN is no JSON
        except ValueError:
            fields[path] = text
    return fields


def _finite(text: str) -> float | str:
    """A number of JSON; 1e999, which would be infinite, stays the text that the service refuses by the field's name."""
    return number if math.isfinite(number := float(text)) else text


def train(client: openai.OpenAI, data: Path, validation: Path | None, wishes: TrainWishes, *, wait: bool) -> int:
    """Upload, create, and watch if asked; returns the exit code."""
    training_file = upload(client, data)
    validation_file = upload(client, validation) if validation is not None else None
    job = post(client, "/fine_tuning/jobs", wishes.body(training_file, validation_file))
    console.print(f"Created [bold]{job['id']}[/] on {escape(wishes.base_model)}.")
    if wait:
        return watch(client, job["id"])
    console.print(f"Watch it with: tunesmith jobs {job['id']} --wait")
    return 0


def upload(client: openai.OpenAI, path: Path, note: Callable[[str], None] = lambda file_id: None) -> str:
    """Upload a file with a progress bar and wait for its validation; ends with the first faults if it is bad. `note` is
    told the file's id as soon as there is one."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), console=console
    )
    with bar, bar.open(path, "rb", description=f"Uploading {path.name}") as file:
        made = client.files.create(file=(path.name, file), purpose="fine-tune")
    note(made.id)
    with console.status("Checking the rows …"):
        client.files.wait_for_processing(made.id, poll_interval=VALIDATION_POLL_S)
    state = get(client, f"/files/{made.id}")
    report = state.get("report") or {}
    if state["status"] == "error":
        for fault in report.get("errors", [])[:NUM_FAULTS_SHOWN]:
            errors.print(f"  line {fault['line']}: {escape(fault['message'])}", soft_wrap=True)
        fail(f"{path.name} cannot be used: {state['status_details']}")
    console.print(f"{path.name}: {report.get('num_records', '?')} rows, file id {made.id}")
    return made.id


def watch(client: openai.OpenAI, job_id: str) -> int:
    """Follow a job's events live; Ctrl-C ends the watching, not the job. Returns the exit code."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    try:
        with bar:
            task = bar.add_task("waiting", total=None, loss="")
            trials_over: set[int] = set()
            for event in follow(client, job_id):
                data = event.get("data") or {}
                if event["type"] == "metrics" and "train_loss" in data:
                    loss = f"loss {data['train_loss']:.3f}"
                    bar.update(
                        task, description="training", completed=data["step"], total=data["total_steps"], loss=loss
                    )
                elif "prompt" in data:
                    bar.console.print(f"step {data['step']} [dim]{escape(data['prompt'])}[/]", soft_wrap=True)
                    bar.console.print(escape(textwrap.indent(data["text"], "  ")), soft_wrap=True)
                elif event["type"] == "message":
                    bar.console.print(escape(event["message"]), soft_wrap=True)
                if data.get("status") in OVER:  # of a sweep's trial
                    trials_over.add(data["trial"])
                    bar.update(task, description="trials", completed=len(trials_over), total=data["num_trials"])
            job = client.fine_tuning.jobs.retrieve(job_id)
            if job.status == "succeeded":
                bar.update(task, total=bar.tasks[0].completed)  # it may have stopped before its last planned step
    except KeyboardInterrupt:
        console.print(f"Stopped watching; the job goes on. Stop it with: tunesmith jobs {job_id} --cancel")
        return 0
    if job.status == "succeeded":
        model = escape(job.fine_tuned_model or "")
        talks = job.method is None or str(job.method.type) not in ("classification", "embedding")
        console.print(f"[green]Succeeded.[/] {'Talk to it: tunesmith chat' if talks else 'Its model:'} {model}")
        return 0
    reason = f": {escape(job.error.message)}" if job.error and job.error.message else ""
    errors.print(f"The job is {job.status}{reason}", soft_wrap=True)
    for request in _suggestions(job):
        errors.print(f"POST /v1/fine_tuning/jobs {escape(request)}", soft_wrap=True)
    return 1


def follow(client: openai.OpenAI, job_id: str) -> Iterator[dict[str, Any]]:
    """A job's events from its first on, live, until it is over."""
    url = f"{client.base_url}fine_tuning/jobs/{job_id}/events?stream=true"
    timeout = httpx2.Timeout(30, read=60)  # keep-alives come more often than that
    with httpx2.stream("GET", url, headers={"Authorization": f"Bearer {client.api_key}"}, timeout=timeout) as response:
        if response.status_code != 200:
            response.read()
            fail(response.json()["error"]["message"])
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def show_all(client: openai.OpenAI) -> None:
    """The newest jobs."""
    shown = table("id", "status", "start", "model", "made")
    for job in client.fine_tuning.jobs.list(limit=20).data:
        shown.add_row(job.id, job.status, escape(job.model), escape(job.fine_tuned_model or "–"), when(job.created_at))
    show(shown, "No jobs yet: `tunesmith train data.jsonl --base-model NAME` makes one.")


def show_one(client: openai.OpenAI, job_id: str) -> int:
    """One job with its last events; returns the exit code."""
    job = client.fine_tuning.jobs.retrieve(job_id)
    for name, value in _facts(job):
        console.print(f"{name:>16}  {escape(str(value))}", soft_wrap=True)
    sweep = (job.model_extra or {}).get("sweep")
    if sweep is not None:
        show_trials(sweep)
    for event in reversed(client.fine_tuning.jobs.list_events(job_id, limit=10).data):
        console.print(f"{when(event.created_at)}  {escape(event.message)}", soft_wrap=True)
    return 0


def _facts(job: FineTuningJob) -> Iterator[tuple[str, object]]:
    yield "id", job.id
    yield "status", job.status
    yield "start", job.model
    yield "model", job.fine_tuned_model or "–"
    if job.hyperparameters is not None:
        yield "epochs", job.hyperparameters.n_epochs
        yield "batch size", job.hyperparameters.batch_size
    yield "trained tokens", job.trained_tokens or "–"
    if job.error and job.error.message:
        yield "error", job.error.message
    for request in _suggestions(job):
        yield "suggestion", request


def _suggestions(job: FineTuningJob) -> list[str]:
    """The corrected request, as JSON, if the service has one."""
    extra = (job.error.model_extra if job.error else None) or {}
    return [json.dumps(extra["suggested_request"])] if extra.get("suggested_request") else []


def steer(client: openai.OpenAI, job_id: str, verb: str) -> None:
    """Cancel, pause or resume."""
    job = post(client, f"/fine_tuning/jobs/{job_id}/{verb}", {})
    console.print(f"{job_id} is {job['status']} now.")
