"""Nothing but health answers without a valid key, and a key reaches its scopes and its project only."""

from __future__ import annotations

import logging

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from service.platform import Platform
from service.store import leases
from tests.api.conftest import BASE, NewClient, upload

PATHS = [
    "/v1/models",
    "/v1/files",
    "/v1/fine_tuning/jobs",
    "/v1/bases",
    "/v1/aliases",
    "/v1/keys",
    "/metrics",
    "/",
    "/x",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic dXNlcg==", "Bearer sk-wrong", "Bearer a b"])
def test_every_path_refuses_a_request_without_a_valid_key(
    anonymous: httpx2.Client, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"authorization": header}
    answer = anonymous.get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_wrong_key_raises_the_clients_authentication_error(service_url: str) -> None:
    wrong = OpenAI(base_url=f"{service_url}/v1", api_key="sk-a-wrong-key-of-some-length", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        wrong.models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id
    assert "a-wrong-key-of-some" not in str(caught.value)


async def test_the_async_client_raises_the_same_error(service_url: str) -> None:
    async with AsyncOpenAI(base_url=f"{service_url}/v1", api_key="sk-wrong", max_retries=0) as wrong:
        with pytest.raises(openai.AuthenticationError) as caught:
            await wrong.fine_tuning.jobs.list()
    assert caught.value.code == "invalid_api_key"


def test_health_answers_without_a_key(anonymous: httpx2.Client, platform: Platform) -> None:
    assert anonymous.get("/healthz").status_code == 200
    waiting = anonymous.get("/readyz")
    assert waiting.status_code == 503
    assert waiting.json()["reasons"] == ["the orchestrator is not running"]
    with platform.db.write() as tx:
        epoch = leases.acquire(tx, "orchestrator", "test", 60)
    assert anonymous.get("/readyz").json() == {"status": "ok", "reasons": []}
    with platform.db.write() as tx:
        assert epoch is not None
        leases.release(tx, "orchestrator", epoch)


def test_metrics_are_prometheus_text(http: httpx2.Client) -> None:
    http.get("/v1/models").raise_for_status()
    text = http.get("/metrics").raise_for_status().text
    assert 'route="/v1/models"' in text
    assert "tunesmith_jobs" in text


def test_a_key_reaches_its_scopes_only(new_client: NewClient, anonymous: httpx2.Client) -> None:
    files = new_client("files")
    files.files.list()
    for call in (files.models.list, files.fine_tuning.jobs.list):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            call()
        assert caught.value.code == "insufficient_permissions"
    metrics = anonymous.get("/metrics", headers={"authorization": f"Bearer {files.api_key}"})
    assert metrics.status_code == 403
    with pytest.raises(openai.PermissionDeniedError):
        new_client("jobs").files.list()
    assert new_client("inference").models.list().data


def test_only_administrators_manage_keys_and_bases(new_client: NewClient, anonymous: httpx2.Client) -> None:
    headers = {"authorization": f"Bearer {new_client().api_key}"}
    for path in ("/v1/keys", "/v1/bases"):
        assert anonymous.get(path, headers=headers).status_code == 403


def test_projects_do_not_see_each_other(new_client: NewClient, platform: Platform) -> None:
    owner, stranger = new_client(), new_client()
    file_id = upload(owner, platform)
    job = owner.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    with pytest.raises(openai.NotFoundError):
        stranger.files.retrieve(file_id)
    for call in (stranger.fine_tuning.jobs.retrieve, stranger.fine_tuning.jobs.cancel):
        with pytest.raises(openai.NotFoundError):
            call(job.id)
    assert not stranger.fine_tuning.jobs.list().data
    with pytest.raises(openai.BadRequestError) as caught:
        stranger.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    assert caught.value.param == "training_file"


def test_secrets_stay_out_of_the_log(http: httpx2.Client, admin_key: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="service"):
        made = http.post("/v1/keys", json={"name": "quiet"}).raise_for_status().json()
        http.get("/v1/models", headers={"authorization": f"Bearer {made['value']}"}).raise_for_status()
        http.get("/healthz").raise_for_status()  # a line is written behind its answer, but before the next request
    fields = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert {"/v1/keys", "/v1/models"} <= {line["path"] for line in fields}
    shown = caplog.text + repr(fields)
    assert admin_key not in shown
    assert made["value"] not in shown
