"""A job's events over HTTP: pages, newest first, and the stream, oldest first, that lasts until the job is over."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import httpx2
import pytest
from openai import OpenAI

from service.platform import Platform
from service.store import events, jobs
from tests.api.conftest import BASE


def add_events(platform: Platform, job_id: str, num: int) -> None:
    with platform.db.write() as tx:
        job = jobs.by_id(tx, job_id)
        for step in range(1, num + 1):
            data = {"step": step, "total_steps": num, "train_loss": 1.0}
            events.add(tx, job, f"Step {step}/{num}: training loss=1.00", type="metrics", data=data)


def test_events_are_paged_newest_first(project_client: OpenAI, platform: Platform, training_file: str) -> None:
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    add_events(platform, job.id, 8)
    first = project_client.fine_tuning.jobs.list_events(job.id, limit=4)
    assert first.data[0].message == "Step 8/8: training loss=1.00"
    every = list(first)
    assert len(every) == 10
    assert every[-1].message == f"Created fine-tuning job: {job.id}"
    assert (every[0].type, every[0].level, every[0].object) == ("metrics", "info", "fine_tuning.job.event")
    assert every[0].data == {"step": 8, "total_steps": 8, "train_loss": 1.0}


@pytest.mark.parametrize("stream", ["false", "true"])
def test_an_event_of_another_job_is_no_cursor(
    project_client: OpenAI, http: httpx2.Client, training_file: str, stream: str
) -> None:
    one, other = (project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file) for _ in range(2))
    strange = project_client.fine_tuning.jobs.list_events(other.id).data[0].id
    path, headers = f"/v1/fine_tuning/jobs/{one.id}/events", {"authorization": f"Bearer {project_client.api_key}"}
    for after in (strange, "ftevent-none"):
        answer = http.get(path, params={"after": after, "stream": stream}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "after")


def read_stream(lines: Any) -> tuple[list[dict[str, Any]], bool]:
    """The events of a stream, and whether it ended as it should."""
    found: list[dict[str, Any]] = []
    for line in lines:
        if line == "data: [DONE]":
            return found, True
        if line.startswith("data: "):
            found.append(json.loads(line.removeprefix("data: ")))
    return found, False


def test_events_are_streamed_from_the_start_until_the_job_is_over(
    project_client: OpenAI, http: httpx2.Client, platform: Platform, training_file: str
) -> None:
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    path = f"/v1/fine_tuning/jobs/{job.id}/events"
    headers = {"authorization": f"Bearer {project_client.api_key}"}
    with http.stream("GET", path, params={"stream": "true"}, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        while not (line := next(lines)).startswith("data: "):
            pass
        assert json.loads(line.removeprefix("data: "))["message"] == f"Created fine-tuning job: {job.id}"
        add_events(platform, job.id, 5)  # while the stream is open
        project_client.fine_tuning.jobs.cancel(job.id)
        followed, is_complete = read_stream(lines)
    assert is_complete
    steps = [event["data"]["step"] for event in followed if event["type"] == "metrics"]
    assert steps == [1, 2, 3, 4, 5]
    assert followed[-1]["message"] == "The job was cancelled"

    third = followed[3]["id"]
    for after in (
        {},
        {"after": third},
        {"after": followed[0]["id"]},
    ):  # the header knows better
        again = http.get(path, headers={**headers, "last-event-id": third}, params={"stream": "true", **after})
        assert read_stream(again.text.splitlines()) == (followed[4:], True)
    unknown = http.get(path, headers=headers, params={"stream": "true", "after": "ftevent-none"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "after")
    limited = http.get(path, headers=headers, params={"stream": "true", "limit": 5})
    assert (limited.status_code, limited.json()["error"]["param"]) == (400, "limit")


class _Finished(logging.Handler):
    """Says when the request of a path was logged, which is when nothing works for it any more."""

    def __init__(self, path: str) -> None:
        super().__init__(logging.INFO)
        self._path = path
        self.seen = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "fields", {}).get("path") == self._path:
            self.seen.set()


def test_a_client_that_leaves_ends_its_stream(
    project_client: OpenAI, http: httpx2.Client, training_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    path = f"/v1/fine_tuning/jobs/{job.id}/events"
    headers = {"authorization": f"Bearer {project_client.api_key}"}
    finished = _Finished(path)
    caplog.set_level(logging.INFO, logger="service")
    logging.getLogger("service").addHandler(finished)
    try:
        with http.stream("GET", path, params={"stream": "true"}, headers=headers) as answer:
            next(answer.iter_lines())
        assert finished.seen.wait(5)
    finally:
        logging.getLogger("service").removeHandler(finished)
