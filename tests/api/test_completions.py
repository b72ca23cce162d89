"""POST /v1/completions through the real client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from service.platform import Platform
from tests.api.live import ECHO, live_service, sync_client
from tests.serving.world import MAX_CONTEXT, add_base


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Platform, str, str]]:
    with live_service(tmp_path_factory.mktemp("completions")) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: tuple[Platform, str, str]) -> Iterator[OpenAI]:
    with sync_client(*service[1:]) as made:
        yield made


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abc"]),
        (["abc", "de"], ["abc", "de"]),
        ([64, 65], ["ab"]),
        ([[64, 65], [66]], ["ab", "c"]),
    ],
)
def test_every_form_of_prompt_is_continued(client: OpenAI, prompt: Any, texts: list[str]) -> None:
    answer = client.completions.create(model=ECHO, prompt=prompt)
    assert answer.object == "text_completion"
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == answer.usage.completion_tokens == sum(map(len, texts))


def test_choices_are_numbered_over_prompts_and_n(client: OpenAI) -> None:
    answer = client.completions.create(model=ECHO, prompt=["a", "b"], n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]


def test_a_stream_of_several_prompts_ends_every_choice_and_then_tells_the_usage(client: OpenAI) -> None:
    stream = client.completions.create(
        model=ECHO, prompt=["abc", "de"], n=2, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons, chunks = [""] * 4, [""] * 4, list(stream)
    for chunk in chunks[:-1]:
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == ["abc", "abc", "de", "de"]
    assert reasons == ["stop"] * 4
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 15


def test_without_a_limit_sixteen_tokens_come_as_from_openai(client: OpenAI) -> None:
    answer = client.completions.create(model=ECHO, prompt="x" * 20)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("x" * 16, "length")
    near_the_end = client.completions.create(model=ECHO, prompt="x" * (MAX_CONTEXT - 2))
    assert near_the_end.choices[0].text == "xx"


def test_one_prompt_too_long_refuses_the_request_before_any_stream(client: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=ECHO, prompt=["a", "x" * MAX_CONTEXT], stream=stream)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize(("field", "value"), [("suffix", "end"), ("best_of", 3)])
def test_what_is_not_honoured_is_refused_by_name(client: OpenAI, field: str, value: Any) -> None:
    unsupported: Any = {field: value}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=ECHO, prompt="a", **unsupported)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", field)


def test_neutral_values_are_accepted(client: OpenAI) -> None:
    neutral: Any = {"echo": False, "suffix": None, "best_of": 1, "logprobs": None, "user": "u"}
    assert client.completions.create(model=ECHO, prompt="a", **neutral).choices[0].text == "a"


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [-1], [2**40], [1.5], ["a", 1], None, 7])
def test_a_prompt_that_cannot_be_continued_is_a_400(client: OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=ECHO, prompt=prompt)
    assert (caught.value.param or "").startswith("prompt")


def test_too_many_prompts_or_choices_are_a_400_and_not_a_time_to_retry(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 128 prompts") as caught:
        client.completions.create(model=ECHO, prompt=["a"] * 129)
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="512 choices") as caught:
        client.completions.create(model=ECHO, prompt=["a"] * 128, n=4)
    assert caught.value.param == "n"


def test_a_prompt_of_a_wrong_type_is_named_without_our_types(client: OpenAI) -> None:
    wrong: Any = {"text": "a"}
    with pytest.raises(openai.BadRequestError, match="expected a string or an array, but got an object") as caught:
        client.completions.create(model=ECHO, prompt=wrong)
    assert caught.value.param == "prompt"


def test_a_chat_only_model_is_a_404_that_points_to_chat(client: OpenAI, service: tuple[Platform, str, str]) -> None:
    add_base(service[0].db, service[0].storage, "chatty", capabilities=["chat"])
    with pytest.raises(openai.NotFoundError, match="chat/completions"):
        client.completions.create(model="chatty", prompt="a")
