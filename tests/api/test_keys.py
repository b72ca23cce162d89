"""Keys are shown once, listed without secrets, and revoked at once."""

from __future__ import annotations

import httpx2
import openai
import pytest

from service.platform import Platform
from tests.api.conftest import NewClient


def test_a_secret_is_shown_once(http: httpx2.Client, platform: Platform) -> None:
    made = http.post("/v1/keys", json={"name": "once"}).raise_for_status().json()
    listed = http.get("/v1/keys", params={"limit": 100}).raise_for_status()
    assert made["id"] in [key["id"] for key in listed.json()["data"]]
    assert made["value"] not in listed.text
    for file in platform.settings.home_dir.glob("tunesmith.db*"):
        assert made["value"].encode() not in file.read_bytes()
    assert set(made["scopes"]) == {"files", "jobs", "models", "inference"}


def test_a_revoked_key_fails_from_the_next_request_on(new_client: NewClient, http: httpx2.Client) -> None:
    client = new_client(project_id="proj-default")
    newest = http.get("/v1/keys", params={"limit": 1}).json()["data"][0]
    client.models.list()
    deleted = http.delete(f"/v1/keys/{newest['id']}").json()
    assert deleted == {"id": newest["id"], "object": "api_key", "deleted": True}
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert http.delete(f"/v1/keys/{newest['id']}").status_code == 404


def test_the_admin_key_file_cannot_be_revoked(http: httpx2.Client) -> None:
    keys = http.get("/v1/keys", params={"limit": 100}).json()["data"]
    (admin,) = [key for key in keys if key["scopes"] == ["admin"] and key["created_by"] is None]
    answer = http.delete(f"/v1/keys/{admin['id']}")
    assert answer.status_code == 400
    assert "file" in answer.json()["error"]["message"]


def test_the_use_of_a_key_is_noted_at_most_once_a_minute(new_client: NewClient, http: httpx2.Client) -> None:
    client = new_client()
    query = {"project_id": client.project or ""}

    def last_used_at() -> float | None:
        (key,) = http.get("/v1/keys", params=query).json()["data"]
        return key["last_used_at"]

    assert last_used_at() is None
    client.models.list()
    first = last_used_at()
    assert first is not None
    client.models.list()
    assert last_used_at() == first


def test_keys_of_another_project_are_listed_and_revoked_by_naming_it(
    new_client: NewClient, http: httpx2.Client
) -> None:
    query = {"project_id": new_client().project or ""}
    (key,) = http.get("/v1/keys", params=query).json()["data"]
    assert http.delete(f"/v1/keys/{key['id']}").status_code == 404
    assert http.delete(f"/v1/keys/{key['id']}", params=query).status_code == 200
    assert http.get("/v1/keys", params=query).json()["data"] == []


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "name", "missing_required_parameter"),
        ({"name": ""}, "name", "invalid_value"),
        ({"name": 3}, "name", "invalid_type"),
        ({"name": "x", "scopes": []}, "scopes", "invalid_value"),
        ({"name": "x", "scopes": ["root"]}, "scopes.0", "invalid_value"),
        ({"name": "x", "project_id": "../x"}, "project_id", "invalid_value"),
        ({"name": "x", "expires": 3}, "expires", "unknown_parameter"),
    ],
)
def test_a_bad_key_request_names_the_field(http: httpx2.Client, body: object, param: str, code: str) -> None:
    answer = http.post("/v1/keys", json=body)
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)
