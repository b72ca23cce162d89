"""The list of models shows what can be called; fine-tuned models can be deleted, bases and pointed-to models cannot."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from service.platform import Platform
from service.store import models
from service.store.database import new_id
from service.store.tables import Model
from tests.api.conftest import BASE, SLASHED_BASE, NewClient, upload


def add_model(platform: Platform, client: OpenAI, base_id: str = BASE, **fields: Any) -> str:
    """A fine-tuned model of the client's project, as publishing would write it."""
    values = {
        "id": new_id(f"ft:{base_id}:local:test:"),
        "project_id": client.project,
        "created_by": None,
        "kind": "adapter",
        "is_checkpoint": False,
        "base_id": base_id,
        "base_content_hash": "0123",
        "parent_id": None,
        "job_id": None,
        "step": None,
        "capabilities": ["chat"],
        "storage_key": "runs/ftjob-x/artifact",
        "manifest_hash": "4567",
        "fingerprint": {"tokenizer": "89ab"},
        "spec": {},
    }
    with platform.db.write() as tx:
        model: Model = models.create(tx, **{**values, **fields})
    return model.id


def test_bases_models_and_aliases_are_listed(platform: Platform, project_client: OpenAI) -> None:
    model_id = add_model(platform, project_client)
    project_client.put("/aliases/prod", cast_to=object, body={"model": model_id})
    found = {model.id: model for model in project_client.models.list()}
    assert {BASE, SLASHED_BASE, model_id, "prod"} <= set(found)
    extra = found[model_id].model_extra or {}
    assert (extra["parent"], extra["max_model_len"], extra["kind"]) == (BASE, 512, "adapter")
    alias = found["prod"].model_extra or {}
    assert (alias["kind"], alias["root"]) == ("alias", model_id)
    assert all(
        isinstance(model.created, int) and model.object == "model" and model.owned_by for model in found.values()
    )


def test_ids_with_slashes_and_colons_are_retrieved(platform: Platform, project_client: OpenAI) -> None:
    checkpoint_id = new_id("ft:org/tiny.v2:local::") + ":ckpt-step-5"
    checkpoint = add_model(platform, project_client, SLASHED_BASE, is_checkpoint=True, id=checkpoint_id)
    for model_id in (BASE, SLASHED_BASE, checkpoint):
        assert project_client.models.retrieve(model_id).id == model_id
        listed = {model.id: model for model in project_client.models.list()}
        assert listed[model_id] == project_client.models.retrieve(model_id)


def test_an_alias_is_retrieved_with_what_it_stands_for(platform: Platform, project_client: OpenAI) -> None:
    project_client.put("/aliases/team/chat", cast_to=object, body={"model": SLASHED_BASE})
    found = project_client.models.retrieve("team/chat")
    assert (found.id, (found.model_extra or {})["root"]) == ("team/chat", SLASHED_BASE)


def test_a_deleted_model_is_gone(platform: Platform, project_client: OpenAI) -> None:
    model_id = add_model(platform, project_client, SLASHED_BASE)
    deleted = project_client.models.delete(model_id)
    assert (deleted.id, deleted.object, deleted.deleted) == (model_id, "model", True)
    assert model_id not in [model.id for model in project_client.models.list()]
    for call in (project_client.models.retrieve, project_client.models.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(model_id)
        assert caught.value.code == "model_not_found"


def test_bases_and_aliases_are_not_deleted_as_models(project_client: OpenAI) -> None:
    project_client.put("/aliases/kept", cast_to=object, body={"model": BASE})
    for name in (BASE, "kept"):
        with pytest.raises(openai.BadRequestError) as caught:
            project_client.models.delete(name)
        assert caught.value.param == "model"
    assert project_client.models.retrieve("kept")


def test_a_model_that_an_alias_points_to_is_not_deleted(platform: Platform, project_client: OpenAI) -> None:
    model_id = add_model(platform, project_client)
    project_client.put("/aliases/prod", cast_to=object, body={"model": model_id})
    with pytest.raises(openai.BadRequestError, match="alias 'prod'"):
        project_client.models.delete(model_id)
    project_client.delete("/aliases/prod", cast_to=object)
    assert project_client.models.delete(model_id).deleted


def test_models_of_other_projects_are_not_shown(platform: Platform, new_client: NewClient) -> None:
    owner, stranger = new_client(), new_client()
    model_id = add_model(platform, owner)
    assert model_id not in [model.id for model in stranger.models.list()]
    with pytest.raises(openai.NotFoundError):
        stranger.models.retrieve(model_id)


async def test_the_async_client_lists_and_retrieves(async_client: AsyncOpenAI) -> None:
    assert SLASHED_BASE in [model.id async for model in async_client.models.list()]
    assert (await async_client.models.retrieve(SLASHED_BASE)).id == SLASHED_BASE


def test_a_base_is_registered_imported_later_and_removed(http: httpx2.Client, client: OpenAI) -> None:
    body = {"id": "org/new-base", "source": "org/name", "revision": "main"}
    made = http.post("/v1/bases", json=body).raise_for_status().json()
    assert (made["id"], made["status"]) == ("org/new-base", "preparing")
    assert http.post("/v1/bases", json=body).json() == made  # a retry
    assert http.post("/v1/bases", json={**body, "revision": "other"}).json()["error"]["param"] == "id"
    assert http.get("/v1/bases/org/new-base").json() == made
    assert "org/new-base" in [base["id"] for base in http.get("/v1/bases").json()["data"]]
    assert "org/new-base" not in [model.id for model in client.models.list()]  # not ready yet
    assert http.delete("/v1/bases/org/new-base").json()["deleted"]
    assert http.get("/v1/bases/org/new-base").status_code == 404


@pytest.mark.parametrize("base_id", ["", "a:b", "/a", "a/", "a//b", "../a", "-a", "ä", "a b", "x" * 65])
def test_a_bad_base_id_is_refused(http: httpx2.Client, base_id: str) -> None:
    answer = http.post("/v1/bases", json={"id": base_id, "source": "x"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "id")


def test_a_base_that_is_needed_is_not_removed(
    http: httpx2.Client, platform: Platform, project_client: OpenAI, client: OpenAI
) -> None:
    job = project_client.fine_tuning.jobs.create(model=SLASHED_BASE, training_file=upload(project_client, platform))
    assert http.delete(f"/v1/bases/{SLASHED_BASE}").status_code == 400
    project_client.fine_tuning.jobs.cancel(job.id)
    client.put("/aliases/of-base", cast_to=object, body={"model": SLASHED_BASE})
    assert "of-base" in http.delete(f"/v1/bases/{SLASHED_BASE}").json()["error"]["message"]
    client.delete("/aliases/of-base", cast_to=object)
