"""POST /v1/embeddings through the real client, in both formats."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from transformers import AutoModel

from service.platform import Platform
from tests.api.encoders import ENCODER, add_encoders
from tests.api.live import async_client, live_service, sync_client
from tests.engine.encoders import CONTEXT, WIDTH, ids_of

TEXTS = ["my card was charged twice", "the app crashes"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Platform, str, str, dict[str, Path]]]:
    with live_service(tmp_path_factory.mktemp("embeddings")) as (platform, url, secret):
        yield platform, url, secret, add_encoders(platform)


@pytest.fixture(scope="module")
def client(service: tuple[Platform, str, str, dict[str, Path]]) -> Iterator[OpenAI]:
    with sync_client(*service[1:3]) as made:
        yield made


@pytest.fixture(scope="module")
def expected(service: tuple[Platform, str, str, dict[str, Path]]) -> np.ndarray:
    """Mean over the tokens, to unit length, one text at a time."""
    model = AutoModel.from_pretrained(service[3][ENCODER]).eval()
    with torch.no_grad():
        means = [model(torch.tensor([ids_of(text)])).last_hidden_state[0].mean(dim=0) for text in TEXTS]
    return torch.stack([mean / mean.norm() for mean in means]).numpy()


@pytest.mark.parametrize("options", [{}, {"encoding_format": "base64"}, {"encoding_format": "float"}])
def test_the_client_gets_the_vectors_in_every_format(client: OpenAI, expected: np.ndarray, options: Any) -> None:
    answer = client.embeddings.create(model=ENCODER, input=TEXTS, **options)
    assert (answer.object, answer.model) == ("list", ENCODER)
    assert [item.index for item in answer.data] == [0, 1]
    rows: list[Any] = [item.embedding for item in answer.data]
    if options.get("encoding_format") == "base64":  # asked for by name, it is handed on as it came
        rows = [np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows]
    assert np.shape(rows) == (2, WIDTH)
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    num_tokens = sum(len(ids_of(text)) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)


@pytest.mark.parametrize("form", [TEXTS[0], list(ids_of(TEXTS[0])), [list(ids_of(TEXTS[0]))], [TEXTS[0]]])
def test_every_form_of_input_is_embedded(client: OpenAI, expected: np.ndarray, form: Any) -> None:
    (item,) = client.embeddings.create(model=ENCODER, input=form).data
    np.testing.assert_allclose(item.embedding, expected[0], atol=1e-5)


async def test_the_asynchronous_client_too(service: Any, expected: np.ndarray) -> None:
    async with async_client(*service[1:3]) as made:
        assert isinstance(made, AsyncOpenAI)
        answer = await made.embeddings.create(model=ENCODER, input=TEXTS)
    np.testing.assert_allclose([item.embedding for item in answer.data], expected, atol=1e-5)


def test_2048_inputs_come_back_in_their_order(client: OpenAI, expected: np.ndarray) -> None:
    answer = client.embeddings.create(model=ENCODER, input=[*["a b"] * 2046, *TEXTS])
    assert len(answer.data) == 2048
    np.testing.assert_allclose([item.embedding for item in answer.data[-2:]], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "code", "param"),
    [
        ([TEXTS[0], "a " * CONTEXT], "context_length_exceeded", "input[1]"),
        ([[2, 3], [2] * (CONTEXT + 1)], "context_length_exceeded", "input[1]"),
        ([[2, 3], [2, 99_999]], "invalid_value", "input[1]"),
        ([2] * (CONTEXT + 1), "context_length_exceeded", "input"),
        (["a"] * 2049, "invalid_value", "input"),
        ("", "invalid_value", "input"),
        ([""], "invalid_value", "input.0"),
        ([[]], "invalid_value", "input.0"),
        ([-1], "invalid_value", "input.0"),
    ],
)
def test_an_input_that_cannot_be_embedded_is_named(client: OpenAI, given: Any, code: str, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=ENCODER, input=given)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_dimensions_are_refused_and_not_dropped(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=ENCODER, input="a", dimensions=8)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "dimensions")
