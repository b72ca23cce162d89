"""POST /v1/classify: a classifier's probabilities over real HTTP, from a real tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select

from service.platform import Platform
from service.store.tables import Usage
from tests.api.encoders import BINARY, CLASSIFIER, ENCODER, add_encoders
from tests.api.live import ECHO, live_service
from tests.api.test_metrics import samples
from tests.engine.encoders import CONTEXT, LABELS, ids_of, probabilities

TEXT = "my card was charged twice"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Platform, httpx2.Client, dict[str, Path]]]:
    with live_service(tmp_path_factory.mktemp("classify")) as (platform, url, secret):
        headers = {"authorization": f"Bearer {secret}"}
        with httpx2.Client(base_url=url, headers=headers, timeout=60) as http:
            yield platform, http, add_encoders(platform)


@pytest.fixture(scope="module")
def http(service: tuple[Platform, httpx2.Client, dict[str, Path]]) -> httpx2.Client:
    return service[1]


def test_every_label_comes_with_its_probability_the_likeliest_first(service: Any) -> None:
    _, http, folders = service
    texts = [TEXT, "the app crashes", "thanks, i love it"]
    answer = http.post("/classify", json={"model": CLASSIFIER, "input": texts}).raise_for_status().json()
    assert (answer["object"], answer["model"]) == ("list", CLASSIFIER)
    for index, text in enumerate(texts):
        item, expected = answer["data"][index], dict(zip(LABELS, probabilities(folders[CLASSIFIER], text), strict=True))
        assert item["index"] == index
        assert {found["label"]: found["probability"] for found in item["probabilities"]} == pytest.approx(
            expected, abs=1e-5
        )
        assert item["label"] == max(expected, key=expected.__getitem__) == item["probabilities"][0]["label"]
        assert item["probability"] == item["probabilities"][0]["probability"]
    num_tokens = sum(len(ids_of(text)) for text in texts)
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_one_text_is_a_list_of_one_and_top_k_cuts(http: httpx2.Client) -> None:
    (item,) = http.post("/classify", json={"model": CLASSIFIER, "input": TEXT, "top_k": 2}).json()["data"]
    assert len(item["probabilities"]) == 2
    assert item["probabilities"][0]["probability"] >= item["probabilities"][1]["probability"]


async def test_tokens_are_counted_for_key_and_metrics(service: Any) -> None:
    platform, http, _ = service
    pages = []
    for texts in ([], [TEXT] * 3):
        if texts:
            http.post("/classify", json={"model": BINARY, "input": texts}).raise_for_status()
        page = http.get(str(http.base_url).removesuffix("/v1/") + "/metrics").content
        pages.append(samples(page).get(("tunesmith_prompt_tokens_total", (ENCODER,)), 0.0))
    num_tokens = 3 * len(ids_of(TEXT))
    assert pages[1] - pages[0] == num_tokens
    async with asyncio.timeout(30):
        while (row := _usage(platform, BINARY)) is None:
            await asyncio.sleep(0.01)  # the row is written beside the answer
    assert (row.num_requests, row.prompt_tokens, row.completion_tokens) == (1, num_tokens, 0)


def _usage(platform: Platform, model_id: str) -> Usage | None:
    with platform.db.read() as tx:
        return tx.scalar(select(Usage).where(Usage.model_id == model_id))


def test_a_text_that_is_too_long_is_named(http: httpx2.Client) -> None:
    texts = [TEXT, "a " * CONTEXT]
    for given, param in ((texts, "input[1]"), (texts[1], "input")):
        answer = http.post("/classify", json={"model": CLASSIFIER, "input": given})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert f"at most {CONTEXT}" in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [[1, 2]]}, "input.0"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"stream": True}, "stream"),
        ({"input": None}, "input"),
    ],
)
def test_what_cannot_be_classified_is_a_400_that_names_the_field(http: httpx2.Client, change: Any, param: str) -> None:
    answer = http.post("/classify", json={"model": CLASSIFIER, "input": TEXT, **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("path", "model", "body", "hint"),
    [
        ("/classify", ECHO, {"input": TEXT}, "v1/chat/completions"),
        ("/classify", ENCODER, {"input": TEXT}, "v1/embeddings"),
        ("/embeddings", CLASSIFIER, {"input": TEXT}, "v1/classify"),
        ("/embeddings", ECHO, {"input": TEXT}, "v1/chat/completions"),
        ("/chat/completions", CLASSIFIER, {"messages": [{"role": "user", "content": "Hi"}]}, "v1/classify"),
        ("/completions", ENCODER, {"prompt": "Hi"}, "v1/embeddings"),
    ],
)
def test_the_wrong_endpoint_says_which_is_right(
    http: httpx2.Client, path: str, model: str, body: Any, hint: str
) -> None:
    answer = http.post(path, json={"model": model, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_supported", "model")
    assert f"Did you mean to use {hint}" in error["message"]


def test_a_key_without_the_scope_is_refused_and_an_unknown_model_not_found(http: httpx2.Client) -> None:
    key = http.post("/keys", json={"name": "files only", "scopes": ["files"]}).json()["value"]
    for path in ("/classify", "/embeddings", "/decisions"):
        refused = http.post(path, json={}, headers={"authorization": f"Bearer {key}"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")
    answer = http.post("/classify", json={"model": "nobody", "input": TEXT})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_classifiers_are_listed_with_what_they_can_do(http: httpx2.Client) -> None:
    listed = {model["id"]: model["capabilities"] for model in http.get("/models").json()["data"]}
    assert (listed[CLASSIFIER], listed[ENCODER]) == (["classify"], ["embed"])
