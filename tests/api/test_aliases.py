"""Aliases move in one step, keep their history, and never hide an immutable id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from openai import OpenAI

from service.platform import Platform
from tests.api.conftest import BASE, SLASHED_BASE, NewClient
from tests.api.test_models import add_model


@pytest.fixture
def api(service_url: str, project_client: OpenAI) -> Iterator[httpx2.Client]:
    """Plain HTTP in the fresh project."""
    headers = {"authorization": f"Bearer {project_client.api_key}"}
    with httpx2.Client(base_url=service_url, headers=headers, verify=False) as made:  # no TLS here: spares its set-up
        yield made


def put(api: httpx2.Client, name: str, model: str) -> dict[str, Any]:
    found: dict[str, Any] = api.put(f"/v1/aliases/{name}", json={"model": model}).raise_for_status().json()
    return found


def test_a_move_is_seen_at_once_and_kept_in_the_history(
    api: httpx2.Client, platform: Platform, project_client: OpenAI
) -> None:
    first, second = add_model(platform, project_client), add_model(platform, project_client)
    for model in (first, second, first):
        put(api, "prod", model)
        with platform.db.read() as tx:
            assert platform.catalog.resolve(tx, project_client.project or "", "prod").model_id == model
        assert (project_client.models.retrieve("prod").model_extra or {})["root"] == model
    alias = api.get("/v1/aliases/prod").json()
    assert (alias["model"], alias["revision"]) == (first, 3)
    assert [state["model"] for state in alias["history"]] == [first, second, first]


def test_a_deleted_alias_is_gone_and_can_be_made_anew(api: httpx2.Client) -> None:
    put(api, "temp", BASE)
    assert api.delete("/v1/aliases/temp").json() == {"id": "temp", "object": "alias", "deleted": True}
    assert api.get("/v1/aliases/temp").status_code == 404
    assert api.delete("/v1/aliases/temp").status_code == 404
    assert api.get("/v1/aliases").json()["data"] == []
    assert put(api, "temp", BASE)["revision"] == 3
    assert [state["model"] for state in api.get("/v1/aliases/temp").json()["history"]] == [BASE, None, BASE]


def test_aliases_are_listed_by_name(api: httpx2.Client) -> None:
    for name in ("b", "a/c", "a"):
        put(api, name, BASE)
    listed = api.get("/v1/aliases").json()
    assert [alias["id"] for alias in listed["data"]] == ["a", "a/c", "b"]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("a", "b", False)


def test_each_project_has_its_own_aliases(new_client: NewClient) -> None:
    for model in (BASE, SLASHED_BASE):
        owner = new_client()
        owner.put("/aliases/same", cast_to=object, body={"model": model})
        assert (owner.models.retrieve("same").model_extra or {})["root"] == model


@pytest.mark.parametrize("name", [BASE, SLASHED_BASE, "ft:tiny:local::1", "-a", "a b", "ä", "x" * 129])
def test_a_name_that_could_be_an_id_is_refused(api: httpx2.Client, name: str) -> None:
    answer = api.put(f"/v1/aliases/{name}", json={"model": BASE})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")


def test_an_alias_points_to_models_only(api: httpx2.Client) -> None:
    put(api, "first", BASE)
    to_alias = api.put("/v1/aliases/second", json={"model": "first"})
    assert (to_alias.status_code, to_alias.json()["error"]["param"]) == (400, "model")
    to_nothing = api.put("/v1/aliases/second", json={"model": "ft:none:local::1"})
    assert (to_nothing.status_code, to_nothing.json()["error"]["code"]) == (404, "model_not_found")
    assert api.get("/v1/aliases/second").status_code == 404


def test_a_base_never_takes_an_aliass_name(http: httpx2.Client, client: OpenAI) -> None:
    client.put("/aliases/taken", cast_to=object, body={"model": BASE})
    answer = http.post("/v1/bases", json={"id": "taken", "source": "starter"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "id")
    client.delete("/aliases/taken", cast_to=object)
