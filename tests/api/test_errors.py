"""Every failure, whoever causes it, is OpenAI's error JSON with the right status, code and field; never a stray 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI
from sqlalchemy.exc import OperationalError

from service.api.errors import install_error_handlers
from service.api.middleware import install_middleware
from service.platform import Platform
from tests.api.conftest import BASE, MAX_BODY_BYTES

JOBS = "/v1/fine_tuning/jobs"
JSON = {"content-type": "application/json"}


def error_of(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The error object, checked for the shape that clients read."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert answer.headers["x-request-id"]
    return error


def test_an_unknown_route_is_a_404(client: OpenAI, http: httpx2.Client) -> None:
    assert error_of(http.get("/v1/nothing/here"), 404)["code"] == "unknown_url"
    assert "base_url" in error_of(http.get("/models"), 404)["message"]
    with pytest.raises(openai.NotFoundError, match=r"POST /v1/images/generations\. This service does not have it"):
        client.images.generate(model=BASE, prompt="x")
    with pytest.raises(openai.NotFoundError) as caught:
        client.post("/fine_tuning/none", cast_to=object)
    assert caught.value.code == "unknown_url"
    assert caught.value.request_id


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", JOBS, "GET, POST"),
        ("POST", "/v1/models/tiny", "GET, DELETE"),
        ("PATCH", "/v1/aliases/a/b", "GET, PUT, DELETE"),
        ("GET", f"{JOBS}/ftjob-1/cancel", "POST"),
        ("DELETE", "/healthz", "GET"),
    ],
)
def test_a_wrong_method_is_a_405_that_says_which_are_right(
    http: httpx2.Client, method: str, path: str, allowed: str
) -> None:
    answer = http.request(method, path)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("body", [b"{", b'{"a":}', b"\xff\xfe{}", b'{"seed": ' + b"9" * 5000 + b"}", b"[" * 100_000])
def test_broken_json_is_a_400(http: httpx2.Client, body: bytes) -> None:
    assert error_of(http.post(JOBS, content=body, headers=JSON), 400)["code"] in ("invalid_json", "invalid_body")


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'"x"', b"3"])
def test_a_body_that_is_no_object_is_a_400(http: httpx2.Client, body: bytes) -> None:
    error = error_of(http.post(JOBS, content=body, headers=JSON), 400)
    assert "JSON object" in error["message"]


def test_a_body_of_another_content_type_is_a_400(http: httpx2.Client) -> None:
    answer = http.post(JOBS, content=b"{}", headers={"content-type": "text/plain"})
    assert "Content-Type" in error_of(answer, 400)["message"]


def test_a_body_over_the_limit_is_a_413(http: httpx2.Client, client: OpenAI) -> None:
    too_long = b" " * (MAX_BODY_BYTES + 1)
    assert error_of(http.post(JOBS, content=too_long, headers=JSON), 413)["code"] == "request_too_large"

    def in_chunks() -> Iterator[bytes]:  # no content-length: the bytes are counted as they arrive
        for _ in range(MAX_BODY_BYTES // 1024 + 1):
            yield b" " * 1024

    assert error_of(http.post(JOBS, content=in_chunks(), headers=JSON), 413)["code"] == "request_too_large"
    with pytest.raises(openai.APIStatusError) as caught:
        client.fine_tuning.jobs.create(model=BASE, training_file="x" * MAX_BODY_BYTES)
    assert caught.value.code == "request_too_large"
    assert error_of(http.post(JOBS, content=too_long[:-1], headers=JSON), 400)


def test_nul_in_a_url_is_a_400(http: httpx2.Client) -> None:
    error_of(http.get("/v1/models/a%00b"), 400)
    error_of(http.get(f"{JOBS}?after=%00"), 400)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "\ud800"}, "model"),
        ({"training_file": "\ud800"}, "training_file"),
        ({"metadata": {"a": "\ud800"}}, "metadata.a"),
        ({"metadata": {"\ud800": "a"}}, "metadata"),
        ({"suffix": "\ud800"}, "suffix"),
        ({"adapter": {"targets": ["\ud800"]}}, "adapter.targets.0"),
    ],
)
def test_half_of_a_surrogate_pair_is_a_400(http: httpx2.Client, body: dict[str, Any], param: str) -> None:
    """Stored once, it would make every list of jobs a 500."""
    sent = json.dumps({**VALID, **body}).encode()
    error = error_of(http.post(JOBS, content=sent, headers=JSON), 400)
    assert (error["param"], error["code"]) == (param, "invalid_value")


def test_any_number_of_retries_in_the_header_is_read(http: httpx2.Client) -> None:
    error_of(http.post(JOBS, json=VALID, headers={"x-stainless-retry-count": "9" * 5000}), 400)


VALID = {"model": BASE, "training_file": "file-1"}
SUPERVISED = "method.supervised.hyperparameters"


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}}


def wandb(**settings: Any) -> dict[str, Any]:
    return {"type": "wandb", "wandb": settings}


DPO = "method.dpo.hyperparameters"


def dpo(**hyperparameters: Any) -> dict[str, Any]:
    return {"method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}}


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": None}, "model", "invalid_type"),
        ({"model": ""}, "model", "invalid_value"),
        ({"model": 1}, "model", "invalid_type"),
        ({"model": "a\0b"}, "model", "invalid_value"),
        ({"training_file": ["x"]}, "training_file", "invalid_type"),
        ({"training_file": "file-none"}, "training_file", "invalid_training_file"),
        ({"colour": 1}, "colour", "unknown_parameter"),
        ({"seed": "1"}, "seed", "invalid_type"),
        ({"seed": True}, "seed", "invalid_type"),
        ({"seed": 1.5}, "seed", "invalid_type"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**31}, "seed", "invalid_value"),
        ({"suffix": ""}, "suffix", "invalid_value"),
        ({"suffix": "x" * 65}, "suffix", "invalid_value"),
        ({"suffix": "a:b"}, "suffix", "invalid_value"),
        ({"suffix": "ä"}, "suffix", "invalid_value"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "invalid_value"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "invalid_value"),
        ({"metadata": {"k": "v" * 513}}, "metadata", "invalid_value"),
        ({"integrations": {"type": "wandb"}}, "integrations", "invalid_type"),
        ({"integrations": [{"type": "mlflow"}]}, "integrations.0.type", "invalid_value"),
        ({"integrations": [{"type": "wandb"}]}, "integrations.0.wandb", "missing_required_parameter"),
        ({"integrations": [wandb()]}, "integrations.0.wandb.project", "missing_required_parameter"),
        ({"integrations": [wandb(project="a/b")]}, "integrations.0.wandb.project", "invalid_value"),
        ({"integrations": [wandb(project="p", tags=[""])]}, "integrations.0.wandb.tags.0", "invalid_value"),
        ({"integrations": [wandb(project="p", team="t")]}, "integrations.0.wandb.team", "unknown_parameter"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised", "unsupported_parameter"),
        (dpo(beta=0), f"{DPO}.beta", "invalid_value"),
        (dpo(beta=2.1), f"{DPO}.beta", "invalid_value"),
        (dpo(beta="0.1"), f"{DPO}.beta", "invalid_value"),
        (dpo(loss_type="hinge"), f"{DPO}.loss_type", "invalid_value"),
        (dpo(loss_type="ipo", gamma=1), f"{DPO}.gamma", "invalid_value"),
        (dpo(bata=1), f"{DPO}.bata", "unknown_parameter"),
        (dpo(learning_rate=0.1, learning_rate_multiplier=2), f"{DPO}.learning_rate_multiplier", "invalid_value"),
        (supervised(beta=0.1), f"{SUPERVISED}.beta", "unknown_parameter"),
        ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_parameter"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "unsupported_parameter"),
        ({"method": {"type": "magic"}}, "method.type", "invalid_value"),
        ({"method": {}}, "method.type", "missing_required_parameter"),
        ({"method": "supervised"}, "method", "invalid_type"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"n_epochs": [1]}}, "hyperparameters.n_epochs", "invalid_type"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta", "unknown_parameter"),
        (supervised(batch_size=257), f"{SUPERVISED}.batch_size", "invalid_value"),
        (supervised(learning_rate=0), f"{SUPERVISED}.learning_rate", "invalid_value"),
        (supervised(lr_scheduler="wild"), f"{SUPERVISED}.lr_scheduler", "invalid_value"),
        (supervised(warmup=1), f"{SUPERVISED}.warmup", "unknown_parameter"),
        (
            supervised(learning_rate=0.1, learning_rate_multiplier=2),
            f"{SUPERVISED}.learning_rate_multiplier",
            "invalid_value",
        ),
        ({"adapter": {"type": "magic"}}, "adapter.type", "invalid_value"),
        ({"adapter": {"type": "none", "rank": 4}}, "adapter", "invalid_value"),
        ({"adapter": {"rank": 0}}, "adapter.rank", "invalid_value"),
        ({"adapter": {"targets": [1]}}, "adapter.targets.0", "invalid_type"),
        ({"num_workers": 0}, "num_workers", "invalid_value"),
        ({"num_workers": 5}, "num_workers", "invalid_value"),
        ({"num_workers": {"min": 1, "max": 5}}, "num_workers.max", "invalid_value"),
        ({"num_workers": {"min": 0, "max": 2}}, "num_workers.min", "invalid_value"),
        ({"num_workers": {"min": 3, "max": 2}}, "num_workers", "invalid_value"),
        ({"num_workers": {"max": 2}}, "num_workers.min", "missing_required_parameter"),
        ({"num_workers": {"min": 1, "max": 2, "step": 1}}, "num_workers.step", "unknown_parameter"),
        ({"num_workers": "1-4"}, "num_workers", "invalid_type"),
        ({"validation_split": 0.6}, "validation_split", "invalid_value"),
        ({"validation_split": 0.1, "validation_file": "file-2"}, "validation_split", "invalid_value"),
        ({"early_stopping": {"patience": 2}}, "early_stopping", "invalid_value"),  # nothing to watch
        ({"early_stopping": {}, "validation_split": 0.1}, "early_stopping.patience", "missing_required_parameter"),
        ({"early_stopping": {"patience": 0}}, "early_stopping.patience", "invalid_value"),
        ({"early_stopping": {"patience": "2"}}, "early_stopping.patience", "invalid_type"),
        ({"early_stopping": {"patience": 2, "min_delta": -1}}, "early_stopping.min_delta", "invalid_value"),
        ({"early_stopping": {"patience": 2, "metric": "loss"}}, "early_stopping.metric", "unknown_parameter"),
        ({"precision": "fp8"}, "precision", "invalid_value"),
        ({"eval_interval": 0}, "eval_interval", "invalid_value"),
        ({"n_evals": 0}, "n_evals", "invalid_value"),
        ({"n_evals": 5, "eval_interval": 2}, "n_evals", "invalid_value"),
        ({"keep_checkpoints": "3"}, "keep_checkpoints", "invalid_type"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(client: OpenAI, change: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/fine_tuning/jobs", cast_to=object, body={**VALID, **change})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"
    assert param.split(".")[-1] in caught.value.message or param.split(".")[-2] in caught.value.message


@pytest.mark.parametrize("missing", ["model", "training_file"])
def test_a_missing_field_is_named(client: OpenAI, missing: str) -> None:
    body = {name: value for name, value in VALID.items() if name != missing}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/fine_tuning/jobs", cast_to=object, body=body)
    assert (caught.value.param, caught.value.code) == (missing, "missing_required_parameter")


def test_messages_say_what_was_expected(http: httpx2.Client) -> None:
    def message(change: dict[str, Any]) -> str:
        return error_of(http.post(JOBS, json={**VALID, **change}), 400)["message"]

    assert message({"seed": "1"}) == "Invalid type for 'seed': expected an integer, but got a string instead."
    assert message({"colour": 1}) == "Unknown parameter: 'colour'."
    assert message({"model": ""}) == "Invalid value for 'model': it should have at least 1 character."
    words = message({"hyperparameters": {"n_epochs": "3"}})
    assert words.endswith("it must be an integer, or it must be 'auto'.")
    epochs = message({"hyperparameters": {"n_epochs": 0}})
    assert epochs.startswith("Invalid value for 'hyperparameters.n_epochs': it should be greater than or equal to 1")
    assert "'auto'" in epochs


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=asc", "after=ftjob-none"])
def test_a_bad_query_parameter_is_named(http: httpx2.Client, query: str) -> None:
    answer = http.get(f"{JOBS}?{query}")
    assert answer.status_code in (400, 404)
    assert error_of(answer, answer.status_code)["param"] == query.split("=")[0]


def test_answers_carry_a_request_id_and_openais_headers(http: httpx2.Client, client: OpenAI) -> None:
    own = http.get("/v1/models", headers={"x-request-id": "mine-1"}).headers
    assert own["x-request-id"] == "mine-1"
    assert own["openai-version"] == "2020-10-01"
    assert int(own["openai-processing-ms"]) >= 0
    assert http.get("/v1/models", headers={"x-request-id": "a b;" * 99}).headers["x-request-id"].startswith("req_")
    assert client.models.list()._request_id


@pytest.mark.parametrize("path", [JOBS, "/v1/models", "/v1/keys"])
def test_a_trailing_slash_means_the_same(http: httpx2.Client, path: str) -> None:
    assert http.get(path + "/").json()["object"] == http.get(path).json()["object"] == "list"


async def test_faults_of_our_own_are_a_500_without_details(platform: Platform, admin_key: str) -> None:
    app = FastAPI()
    app.state.platform = platform

    @app.get("/bug")
    def bug() -> None:
        raise KeyError("a private detail")

    @app.get("/locked")
    def locked() -> None:
        raise OperationalError("SELECT private", {}, Exception("database is locked"))

    install_error_handlers(app)
    install_middleware(app)
    headers = {"authorization": f"Bearer {admin_key}"}
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://in.process") as inside:
        broken = await inside.get("/bug", headers=headers)
        assert error_of(broken, 500)["code"] == "server_error"
        assert "private" not in broken.text
        busy = await inside.get("/locked", headers=headers)
        assert error_of(busy, 503)["code"] == "service_unavailable"
        assert "private" not in busy.text
        assert busy.headers["retry-after"] == "1"


any_text = st.text(st.characters(), max_size=8)  # with lone surrogates, which `text()` by itself leaves out
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.sampled_from(["auto", BASE, "supervised"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)
BODIES: dict[str, tuple[str, ...]] = {
    f"POST {JOBS}": (
        *("model", "training_file", "validation_file", "suffix", "seed", "metadata", "integrations", "method"),
        *("hyperparameters", "adapter", "num_workers", "validation_split", "precision", "priority", "eval_interval"),
        *("early_stopping", "n_evals", "keep_checkpoints"),
    ),
    "POST /v1/keys": ("name", "scopes", "project_id"),
    "POST /v1/bases": ("id", "source", "revision"),
    "PUT /v1/aliases/fuzzed": ("model",),
}


@pytest.mark.parametrize("route", BODIES)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_body_whatever_makes_a_500(http: httpx2.Client, route: str, data: st.DataObject) -> None:
    method, path = route.split()
    body = data.draw(any_json | st.dictionaries(st.sampled_from(BODIES[route]), any_json))
    sent = json.dumps(body).encode()  # with NaN, Infinity and lone surrogates, which clients do send
    answer = http.request(method, path, content=sent, headers=JSON)
    if answer.status_code != 200:
        assert answer.status_code in (400, 404), answer.text
        error_of(answer, answer.status_code)
