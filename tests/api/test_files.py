"""/v1/files through the real client: upload, validation, listing, download, deletion, and what is refused."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import httpx2
import pytest
import uvicorn
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI, PermissionDeniedError
from sqlalchemy import select

from service.app import build_app
from service.files.upload import BLOCK_BYTES, INCOMING
from service.files.validation import run_validation
from service.platform import Platform
from service.store.tables import Task
from tests.api.conftest import BASE, RECORD, NewClient, _Server, upload
from tests.shared import DATA, needs_shared

GOOD = RECORD * 10


def open_tasks(platform: Platform, kind: str) -> list[dict[str, str]]:
    with platform.db.read() as tx:
        return [task.payload for task in tx.scalars(select(Task).where(Task.kind == kind))]


def test_a_file_is_stored_listed_returned_and_deleted(project_client: OpenAI, platform: Platform) -> None:
    made = project_client.files.create(file=("train.jsonl", GOOD), purpose="fine-tune")
    assert made.id.startswith("file-")
    assert (made.object, made.bytes, made.filename) == ("file", len(GOOD), "train.jsonl")
    assert (made.purpose, made.status, made.status_details, made.expires_at) == ("fine-tune", "uploaded", None, None)
    assert made.sha256 == hashlib.sha256(GOOD).hexdigest()  # type: ignore[attr-defined]
    assert {"file_id": made.id} in open_tasks(platform, "validate_file")

    assert project_client.files.retrieve(made.id) == made
    assert project_client.files.list().data == [made]
    content = project_client.files.content(made.id)
    assert content.read() == GOOD
    assert content.response.headers["content-type"] == "application/octet-stream"
    assert content.response.headers["content-disposition"].startswith('attachment; filename="train.jsonl"')

    deleted = project_client.files.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "file", True)
    assert {"key": f"files/{made.id}"} in open_tasks(platform, "delete_folder")
    assert project_client.files.list().data == []
    for call in (project_client.files.retrieve, project_client.files.content, project_client.files.delete):
        with pytest.raises(NotFoundError):
            call(made.id)


def test_waiting_for_processing_ends_with_the_report(project_client: OpenAI, platform: Platform) -> None:
    file_id = upload(project_client, platform, GOOD)
    found = project_client.files.wait_for_processing(file_id)
    assert (found.status, found.status_details) == ("processed", None)
    report = found.report  # type: ignore[attr-defined]
    assert (report["kind"], report["num_records"], report["num_duplicates"]) == ("chat", 10, 9)


def test_a_bad_file_says_which_line_is_wrong_and_how_to_mend_it(project_client: OpenAI, platform: Platform) -> None:
    bad = RECORD.replace(b'"user"', b'"human"')
    found = project_client.files.retrieve(upload(project_client, platform, RECORD + bad + b"oops\n"))
    assert found.status == "error"
    assert str(found.status_details).startswith('2 lines are invalid; line 2: messages[0].role: "human" is not a role')
    assert [error["line"] for error in found.report["errors"]] == [2, 3]  # type: ignore[attr-defined]


@pytest.mark.parametrize("purpose", ["user_data", "evals", "batch"])
def test_files_of_other_purposes_are_stored_as_they_are(
    project_client: OpenAI, platform: Platform, purpose: str
) -> None:
    data = bytes(range(256))
    made = project_client.files.create(file=data, purpose=purpose)  # type: ignore[arg-type]
    assert (made.status, made.filename) == ("processed", "upload")
    assert {"file_id": made.id} not in open_tasks(platform, "validate_file")
    assert project_client.files.content(made.id).read() == data


def test_paging_goes_through_all_files_in_both_orders(project_client: OpenAI) -> None:
    ids = [project_client.files.create(file=GOOD, purpose="fine-tune").id for _ in range(5)]
    other = project_client.files.create(file=GOOD, purpose="evals").id
    listed = [file.id for file in project_client.files.list(limit=2, purpose="fine-tune")]
    assert listed == ids[::-1]
    assert [file.id for file in project_client.files.list(limit=2, order="asc")] == [*ids, other]
    page = project_client.files.list(limit=2, after=ids[3], order="asc")
    assert ([file.id for file in page.data], page.has_more) == ([ids[4], other], False)
    assert (page.first_id, page.last_id) == (ids[4], other)  # type: ignore[attr-defined]


def test_wrong_list_parameters_are_named(project_client: OpenAI) -> None:
    for query, name in (({"limit": 0}, "limit"), ({"limit": 10_001}, "limit"), ({"order": "up"}, "order")):
        with pytest.raises(BadRequestError) as caught:
            project_client.files.list(extra_query=query)
        assert caught.value.param == name
    with pytest.raises(BadRequestError) as surplus:
        project_client.files.list(extra_query={"colour": "red"})
    assert (surplus.value.code, surplus.value.param) == ("unknown_parameter", "colour")
    with pytest.raises(NotFoundError) as unknown:
        project_client.files.list(after="file-of-nobody")
    assert unknown.value.param == "after"


def test_files_of_another_project_do_not_exist(project_client: OpenAI, new_client: NewClient) -> None:
    file_id = project_client.files.create(file=GOOD, purpose="fine-tune").id
    stranger = new_client()
    assert stranger.files.list().data == []
    for call in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
        with pytest.raises(NotFoundError):
            call(file_id)
    assert project_client.files.retrieve(file_id).id == file_id


def test_a_key_without_the_scope_may_not_touch_files(new_client: NewClient) -> None:
    with pytest.raises(PermissionDeniedError):
        new_client("inference").files.create(file=GOOD, purpose="fine-tune")
    with pytest.raises(PermissionDeniedError):
        new_client("inference").files.list()


def test_expiry_is_counted_from_creation(project_client: OpenAI) -> None:
    expiry = {"anchor": "created_at", "seconds": 3600}
    made = project_client.files.create(file=GOOD, purpose="fine-tune", expires_after=expiry)  # type: ignore[arg-type]
    assert made.expires_at is not None
    assert made.expires_at - made.created_at in (3599, 3600)
    with pytest.raises(BadRequestError) as caught:
        project_client.files.create(
            file=GOOD, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 5}
        )
    assert caught.value.param == "expires_after[seconds]"


def test_a_wrong_upload_names_the_parameter(project_client: OpenAI, http: httpx2.Client) -> None:
    with pytest.raises(BadRequestError) as caught:
        project_client.files.create(file=GOOD, purpose="assistants")
    assert caught.value.param == "purpose"
    assert "fine-tune" in caught.value.message
    with pytest.raises(BadRequestError) as empty:
        project_client.files.create(file=("a.jsonl", b""), purpose="fine-tune")
    assert empty.value.param == "file"
    with pytest.raises(BadRequestError) as extra:
        project_client.files.create(file=GOOD, purpose="fine-tune", extra_body={"colour": "red"})
    assert (extra.value.param, extra.value.code) == ("colour", "unknown_parameter")

    wrong: list[tuple[httpx2.Response, str | None]] = [
        (http.post("/v1/files", data={"purpose": "fine-tune"}, files={"colour": b"red"}), "colour"),
        (http.post("/v1/files", files={"purpose": (None, "fine-tune")}), "file"),
        (http.post("/v1/files", files={"file": GOOD}), "purpose"),
        (http.post("/v1/files", json={"purpose": "fine-tune"}), None),
        (http.post("/v1/files"), None),
        (http.post("/v1/files", content=b"x", headers={"content-type": "multipart/form-data; boundary=b"}), None),
    ]
    for answer, param in wrong:
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param


@contextmanager
def serving(platform: Platform) -> Iterator[str]:
    """A second service over the same state, with other settings."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = _Server(uvicorn.Config(build_app(platform), log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    assert server.listening.wait(30)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def test_a_file_over_the_limit_gets_413_and_nothing_stays(platform: Platform, admin_key: str) -> None:
    limit = 2 * BLOCK_BYTES
    small = replace(platform, settings=platform.settings.model_copy(update={"max_file_bytes": limit}))
    with serving(small) as url, OpenAI(base_url=url, api_key=admin_key, max_retries=0) as client:
        assert client.files.create(file=b"x" * limit, purpose="user_data").bytes == limit
        for size in (limit + 1, 8 * limit):
            with pytest.raises(APIStatusError) as caught:
                client.files.create(file=b"x" * size, purpose="user_data")
            assert caught.value.status_code == 413
            assert (caught.value.param, caught.value.code) == ("file", "request_too_large")
    assert platform.storage.list_names(INCOMING) == []


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll what no event tells; the test's own timeout ends it."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.01)


def test_an_upload_that_breaks_off_leaves_nothing(platform: Platform, service_url: str, admin_key: str) -> None:
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {admin_key}\r\nContent-Length: 99999999\r\n"
        "Content-Type: multipart/form-data; boundary=b0\r\n\r\n"
        '--b0\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    address = urlsplit(service_url)
    with socket.create_connection((str(address.hostname), int(address.port or 0))) as connection:
        connection.sendall(head.encode() + b"x" * (3 * BLOCK_BYTES))
        wait_until(lambda: platform.storage.list_names(INCOMING) != [])
    wait_until(lambda: platform.storage.list_names(INCOMING) == [])


def test_a_file_that_a_job_needs_cannot_be_deleted(project_client: OpenAI, training_file: str) -> None:
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    with pytest.raises(BadRequestError) as caught:
        project_client.files.delete(training_file)
    assert job.id in caught.value.message
    assert project_client.files.content(training_file).read()
    project_client.fine_tuning.jobs.cancel(job.id)
    assert project_client.files.delete(training_file).deleted


@needs_shared
def test_naughty_file_names_are_stored_safely(project_client: OpenAI) -> None:
    names: list[str] = json.loads((DATA / "ugly-blns" / "blns.json").read_text())
    for name in [*names[::16], "../../etc/passwd", "a\\b", "\r\nset-cookie: x"]:
        made = project_client.files.create(file=(name, b"x"), purpose="user_data")
        assert made.filename
        assert "/" not in made.filename
        assert not any(unicodedata.category(char) == "Cc" for char in made.filename)
        assert project_client.files.content(made.id).read() == b"x"


@needs_shared
def test_malformed_files_are_answered_clearly(project_client: OpenAI, platform: Platform) -> None:
    """Some of those that tests/files validates, and each that is empty."""
    paths = sorted(path for path in DATA.glob("ugly-*/**/*") if path.is_file())
    for path in [*paths[::16], *(path for path in paths if path.name == "chatml.jsonl" or not path.stat().st_size)]:
        data = path.read_bytes()
        if not data:
            with pytest.raises(BadRequestError):
                project_client.files.create(file=(path.name, data), purpose="fine-tune")
            continue
        made = project_client.files.create(file=(path.name, data), purpose="fine-tune")
        run_validation(platform.db, platform.storage, made.id)
        found = project_client.files.retrieve(made.id)
        assert found.status == ("processed" if path.name == "chatml.jsonl" else "error"), path
        assert found.status_details or found.status == "processed", path


async def test_the_async_client_uploads_and_reads(async_client: AsyncOpenAI) -> None:
    made = await async_client.files.create(file=("a.jsonl", GOOD), purpose="fine-tune")
    assert (await async_client.files.content(made.id)).read() == GOOD
    assert (await async_client.files.delete(made.id)).deleted
