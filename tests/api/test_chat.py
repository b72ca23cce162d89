"""POST /v1/chat/completions through the real client: answers, streams, refusals, errors, disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI

from service.platform import Platform
from service.serving.engines import InProcessEngines
from service.store import aliases
from service.store.instance import DEFAULT_PROJECT
from service.store.tables import Usage
from tests.api.live import ECHO, async_client, live_service, sync_client
from tests.serving.world import MAX_CONTEXT, add_base, add_model

HI: Any = [{"role": "user", "content": "Hi"}]
ANSWER = "user\nHi\nassistant\n"  # the echo engine answers with the prompt


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Platform, str, str]]:
    with live_service(tmp_path_factory.mktemp("chat")) as running:
        yield running


@pytest.fixture(scope="module")
def platform(service: tuple[Platform, str, str]) -> Platform:
    return service[0]


@pytest.fixture(scope="module")
def client(service: tuple[Platform, str, str]) -> Iterator[OpenAI]:
    with sync_client(*service[1:]) as made:
        yield made


@pytest.fixture(scope="module")
def http(service: tuple[Platform, str, str]) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service[1], headers={"authorization": f"Bearer {service[2]}"}) as made:
        yield made


def test_a_whole_answer_has_all_that_openai_promises(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=ECHO, messages=HI)
    assert raw.headers["x-model-version"] == ECHO
    answer = raw.parse()
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == ECHO
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert choice.message.content == ANSWER
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None


def test_a_stream_begins_with_the_role_and_ends_with_the_usage(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=ECHO, messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert stream.response.headers["cache-control"] == "no-cache"
    assert stream.response.headers["x-accel-buffering"] == "no"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_helper_assembles_two_choices(client: OpenAI) -> None:
    with client.chat.completions.stream(model=ECHO, messages=HI, n=2, stream_options={"include_usage": True}) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == [ANSWER, ANSWER]
    assert final.usage is not None
    assert final.usage.completion_tokens % 2 == 0


def test_the_wire_is_one_line_per_event_and_ends_with_done(http: httpx2.Client) -> None:
    body = {"model": ECHO, "messages": [{"role": "user", "content": 'é "\n\u2028\U0001f600'}], "stream": True, "n": 2}
    events = http.post("/chat/completions", json=body).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert [chunk["choices"][0]["index"] for chunk in chunks[:2]] == [0, 1]
    assert "usage" not in chunks[0]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"][0]["index"])
    assert 'é "\n\u2028\U0001f600' in text


async def test_the_async_client_streams_too(service: tuple[Platform, str, str]) -> None:
    async with async_client(*service[1:]) as client:
        stream = await client.chat.completions.create(model=ECHO, messages=HI, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ANSWER


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_token_limit_ends_with_length(client: OpenAI, field: str) -> None:
    limit: Any = {field: 4}
    answer = client.chat.completions.create(model=ECHO, messages=HI, **limit)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (
        "use",
        "length",
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_a_stop_string_ends_with_stop_and_is_left_out(client: OpenAI) -> None:
    for stop in ("Hi", ["zzz", "Hi"]):
        answer = client.chat.completions.create(model=ECHO, messages=HI, stop=stop)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("user\n", "stop")


def test_parts_roles_and_tool_history_reach_the_template(client: OpenAI) -> None:
    function = {"name": "add", "arguments": '{"a": 1}', "parsed_arguments": None}  # the client's helpers add the last
    call = {"id": "call_1", "type": "function", "function": function, "index": 0}
    history: Any = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "three"},
    ]
    content = client.chat.completions.create(model=ECHO, messages=history).choices[0].message.content
    assert content is not None
    for part in ("Be kind.", "OneTwo", "add", "three"):
        assert part in content


def test_an_answer_can_be_sent_back_as_it_came(client: OpenAI) -> None:
    message: Any = client.chat.completions.create(model=ECHO, messages=HI).choices[0].message
    parsed: Any = client.chat.completions.parse(model=ECHO, messages=HI).choices[0].message
    with client.chat.completions.stream(model=ECHO, messages=HI) as stream:
        streamed: Any = stream.get_final_completion().choices[0].message
    for sent_back in (message, parsed, streamed):
        again = client.chat.completions.create(model=ECHO, messages=[*HI, sent_back, *HI])
        assert again.choices[0].message.content


def test_fields_without_effect_on_the_answer_are_accepted(client: OpenAI) -> None:
    neutral: Any = {
        "tools": [],
        "logprobs": False,
        "n": 1,
        "response_format": {"type": "text"},
        "store": False,
        "user": "u",
        "safety_identifier": "s",
        "logit_bias": {},
        "modalities": ["text"],
        "temperature": None,
        "seed": 7,
        "presence_penalty": 0.5,
    }
    assert client.chat.completions.create(model=ECHO, messages=HI, **neutral).choices[0].message.content == ANSWER


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("store", True),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("metadata", {"a": "b"}),
        ("web_search_options", {}),
        ("prediction", {"type": "content", "content": "x"}),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(client: OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=ECHO, messages=HI, extra_body={field: value})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", field)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"colour": 1}, "unknown_parameter", "colour"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "Hi"}, "invalid_type", "messages"),
        ({"messages": None}, "invalid_type", "messages"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported_parameter", None),
        ({"messages": [{"role": "user", "content": {"type": "text"}}]}, "invalid_type", "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "invalid_value", "messages.0"),
        ({"messages": [{"role": "user", "content": "x", "refusal": "no"}]}, "invalid_value", "messages.0"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, None),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": "hot"}, "invalid_type", "temperature"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": True}, "invalid_type", "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_value", "stop"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "invalid_value", "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "unsupported_parameter", None),
    ],
)
def test_a_wrong_request_is_a_400_that_names_the_field(
    http: httpx2.Client, body: dict[str, Any], code: str | None, param: str | None
) -> None:
    sent = json.dumps({"model": ECHO, "messages": HI, **body}).encode()
    answer = http.post("/chat/completions", content=sent)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert code is None or error["code"] == code
    assert param is None or error["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model": "\xed\xa0\x80"}', b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_a_400(http: httpx2.Client, body: bytes) -> None:
    assert http.post("/chat/completions", content=body).status_code == 400


def test_an_unknown_query_parameter_is_a_400(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=ECHO, messages=HI, extra_query={"api-version": "1"})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "api-version")


def test_an_unknown_model_is_a_404_in_openais_words(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist or you do not have access to it") as caught:
        client.chat.completions.create(model="gpt-9", messages=HI)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_model_without_chat_is_a_404_that_points_to_completions(client: OpenAI, platform: Platform) -> None:
    add_base(platform.db, platform.storage, "plain", capabilities=["completions"])
    with pytest.raises(openai.NotFoundError, match="not a chat model"):
        client.chat.completions.create(model="plain", messages=HI)


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_a_conversation_is_a_400_before_any_stream(client: OpenAI, stream: bool) -> None:
    long: Any = [{"role": "user", "content": "x" * MAX_CONTEXT}]
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {MAX_CONTEXT} tokens") as caught:
        client.chat.completions.create(model=ECHO, messages=long, stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="you requested") as caught:
        client.chat.completions.create(model=ECHO, messages=HI, max_completion_tokens=MAX_CONTEXT)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_completion_tokens")


def test_a_moved_alias_is_seen_by_the_next_request(client: OpenAI, platform: Platform) -> None:
    for number in range(3):
        model_id = f"ft:{ECHO}:o::{number}"
        add_model(platform.db, platform.storage, ECHO, model_id)
        with platform.db.write() as tx:
            aliases.put(tx, project_id=DEFAULT_PROJECT, name="prod", model_id=model_id, created_by=None)
        answer = client.chat.completions.create(model="prod", messages=HI)
        assert answer.model == model_id
        assert answer.choices[0].message.content == f"[{model_id}] {ANSWER}"


def test_a_full_model_answers_from_a_deployment_of_its_own(client: OpenAI, platform: Platform) -> None:
    add_model(platform.db, platform.storage, ECHO, f"ft:{ECHO}:o::full", kind="full")
    answer = client.chat.completions.create(model=f"ft:{ECHO}:o::full", messages=HI)
    assert answer.choices[0].message.content == ANSWER


async def test_tokens_are_charged_to_key_and_model(platform: Platform, service: tuple[Platform, str, str]) -> None:
    add_model(platform.db, platform.storage, ECHO, f"ft:{ECHO}:o::paid")
    async with async_client(*service[1:]) as client:
        answer = await client.chat.completions.create(model=f"ft:{ECHO}:o::paid", messages=HI)
    assert answer.usage is not None
    async with asyncio.timeout(30):
        while (row := _usage(platform, f"ft:{ECHO}:o::paid")) is None:
            await asyncio.sleep(0.01)  # the row is written beside the answer
    assert (row.prompt_tokens, row.completion_tokens) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)


def _usage(platform: Platform, model_id: str) -> Usage | None:
    with platform.db.read() as tx:
        return tx.query(Usage).filter_by(model_id=model_id).one_or_none()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_sequence(tmp_path_factory: pytest.TempPathFactory, stream: bool) -> None:
    home = tmp_path_factory.mktemp("slow")
    with live_service(home, echo_token_interval_ms=50.0, max_batch_size=1, max_waiting=1) as (platform, url, secret):
        async with async_client(url, secret) as client:
            asking = asyncio.create_task(client.chat.completions.create(model=ECHO, messages=HI, stream=stream))
            await _until_running(platform, 1)
            if stream:
                await (await asking).close()
            else:
                asking.cancel()
            await _until_running(platform, 0)


async def _until_running(platform: Platform, num_running: int) -> None:
    assert isinstance(platform.engines, InProcessEngines)
    deployable = platform.catalog.lookup(DEFAULT_PROJECT, ECHO).deployable
    async with asyncio.timeout(30):
        while True:
            start = platform.engines._cores.get(deployable.key)
            if start is not None and start.done() and start.result().stats().num_running == num_running:
                return
            await asyncio.sleep(0.01)  # the server runs in another thread: there is no event to await


async def test_more_than_fits_the_queue_is_a_429_with_a_time_to_retry(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("full")
    with live_service(home, echo_token_interval_ms=50.0, max_batch_size=1, max_waiting=1) as (platform, url, secret):
        async with async_client(url, secret) as client:
            first = await client.chat.completions.create(model=ECHO, messages=HI, stream=True, n=2)
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError) as caught:
                    await client.chat.completions.create(model=ECHO, messages=HI, stream=stream)
                assert caught.value.response.headers["retry-after"]
            await first.close()
            await _until_running(platform, 0)
            assert (await client.chat.completions.create(model=ECHO, messages=HI)).choices[0].message.content == ANSWER


async def test_an_engine_that_dies_in_a_stream_is_told_as_an_error_event(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with live_service(tmp_path_factory.mktemp("dying"), echo_token_interval_ms=50.0) as (platform, url, secret):
        async with async_client(url, secret) as client:
            stream = await client.chat.completions.create(model=ECHO, messages=HI, stream=True)
            assert isinstance(platform.engines, InProcessEngines)
            deployable = platform.catalog.lookup(DEFAULT_PROJECT, ECHO).deployable
            await platform.engines._cores[deployable.key].result().engine.stop()
            with pytest.raises(openai.APIError, match="engine stopped"):
                async for _ in stream:
                    pass
