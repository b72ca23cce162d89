"""Log-probabilities, echo, logit_bias, top_k and min_p through the real client, on a tiny model that really answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.api.live import ECHO, TRAINABLE, live_service, sync_client, training_service
from tests.training.runs import BASE_KEY

HI: Any = [{"role": "user", "content": "Hi"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 12}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logprobs")


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[OpenAI]:
    with training_service(home) as (_, made):
        yield made


@pytest.fixture(scope="module")
def echo_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with live_service(tmp_path_factory.mktemp("echo")) as (_, url, secret), sync_client(url, secret) as made:
        yield made


@pytest.fixture(scope="module")
def folder(home: Path, client: OpenAI) -> Path:
    return home / "source" / BASE_KEY


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def expected(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities [positions - 1, vocabulary] of the tokens after the first, by one plain forward pass."""
    with torch.inference_mode():
        logprobs: torch.Tensor = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    return logprobs


# -- chat --------------------------------------------------------------------------------------------------------------


def test_chat_tells_each_token_with_its_bytes_and_the_likeliest(client: OpenAI, model: Any, tokenizer: Any) -> None:
    answer = client.chat.completions.create(model=TRAINABLE, messages=HI, logprobs=True, top_logprobs=20, **GREEDY)
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    content = choice.logprobs.content
    raw = bytes(byte for token in content for byte in token.bytes or ())
    assert raw.decode(errors="replace") == choice.message.content
    prompt = tokenizer.apply_chat_template(HI, add_generation_prompt=True, return_dict=False)
    by_bytes = {bytes([i]): tokenizer.convert_tokens_to_ids(char) for i, char in _byte_level().items()}
    ids = [by_bytes[bytes(token.bytes or ())] for token in content]
    logprobs = expected(model, prompt + ids)[len(prompt) - 1 :]
    assert [token.logprob for token in content] == pytest.approx(
        [float(row[token_id]) for row, token_id in zip(logprobs, ids, strict=True)], abs=TOLERANCE
    )
    for token, row in zip(content, logprobs, strict=True):
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(row.topk(20).values.tolist(), abs=TOLERANCE)
        assert token.top_logprobs[0].logprob == token.logprob  # greedy


def _byte_level() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def test_a_chat_stream_tells_the_same_as_the_whole_answer(client: OpenAI) -> None:
    options: Any = {"model": TRAINABLE, "messages": HI, "logprobs": True, "top_logprobs": 2, "n": 2, **GREEDY}
    whole = client.chat.completions.create(**options)
    streamed: list[list[Any]] = [[], []]
    for chunk in client.chat.completions.create(stream=True, **options):
        choice = chunk.choices[0]
        if choice.logprobs is not None:
            assert choice.delta.content is not None
            streamed[choice.index] += choice.logprobs.content or ()
    assert [choice.logprobs.content for choice in whole.choices if choice.logprobs] == streamed
    with client.chat.completions.stream(**options) as stream:
        stream.until_done()
        final = stream.current_completion_snapshot
    assert final.choices[1].logprobs is not None
    assert final.choices[1].logprobs.content == streamed[1]


def test_a_stop_string_cuts_the_entries_with_the_text(echo_client: OpenAI) -> None:
    for stream in (False, True):
        raw, text = b"", ""
        options: Any = {"model": ECHO, "messages": HI, "logprobs": True, "stop": "Hi"}
        if stream:
            for chunk in echo_client.chat.completions.create(stream=True, **options):
                text += chunk.choices[0].delta.content or ""
                logprobs = chunk.choices[0].logprobs
                raw += bytes(byte for token in (logprobs and logprobs.content) or () for byte in token.bytes or ())
        else:
            choice = echo_client.chat.completions.create(**options).choices[0]
            text, tokens = choice.message.content or "", (choice.logprobs and choice.logprobs.content) or ()
            raw = bytes(byte for token in tokens for byte in token.bytes or ())
            assert all(token.top_logprobs == [] for token in tokens)
        assert raw.decode() == text == "user\n"


def test_without_logprobs_the_answer_has_none(echo_client: OpenAI) -> None:
    for neutral in ({}, {"logprobs": False}, {"logprobs": None, "top_logprobs": 0}):
        sent: Any = neutral
        assert echo_client.chat.completions.create(model=ECHO, messages=HI, **sent).choices[0].logprobs is None
    assert echo_client.completions.create(model=ECHO, prompt="a").choices[0].logprobs is None


# -- completions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_evaluation_harness_scores_token_id_prompts(client: OpenAI, model: Any, max_tokens: int) -> None:
    """The request of lm-eval's `local-completions`, and how it reads the answer: a context's length is cut off the
    front, the generated token off the end, and an answer is greedy if each token is the likeliest."""
    prompts = [[1, 50, 60, 70, 80], [1, 90, 91], [1, 20, 200, 230, 31, 32, 33]]
    options: Any = {"temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "seed": 1234, "echo": True}
    answer = client.completions.create(model=TRAINABLE, prompt=prompts, **options)
    assert len(answer.choices) == len(prompts)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        found = choice.logprobs
        assert found is not None
        assert found.tokens is not None
        assert found.token_logprobs is not None
        assert found.top_logprobs is not None
        for part in (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset):
            assert len(part or ()) == len(prompt) + max_tokens
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        logprobs = expected(model, prompt)
        told = found.token_logprobs[1 : len(prompt)]
        wanted = logprobs[range(len(prompt) - 1), prompt[1:]].tolist()
        assert told == pytest.approx(wanted, abs=TOLERANCE)
        for row, token_id, logprob, top in zip(logprobs, prompt[1:], told, found.top_logprobs[1:], strict=False):
            assert (max(top.values()) == logprob) == (int(row.argmax()) == token_id)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    assert answer.usage.completion_tokens == max_tokens * len(prompts)


def test_echo_comes_before_the_continuation_and_offsets_count_through(client: OpenAI) -> None:
    prompt = "two 🙂 things"
    plain = client.completions.create(model=TRAINABLE, prompt=prompt, **GREEDY).choices[0]
    options: Any = {"model": TRAINABLE, "prompt": prompt, "echo": True, "logprobs": 5, **GREEDY}
    choice = client.completions.create(**options).choices[0]
    assert choice.text == prompt + plain.text
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    for token, start, stop in zip(tokens, offsets, [*offsets[1:], len(choice.text)], strict=True):
        if not token.startswith(("bytes:", "<")):
            assert choice.text[start:stop] == token
    assert next(token for token in tokens if token.startswith("bytes:")) == "bytes:\\xf0"
    assert all(5 <= len(top) <= 6 for top in (choice.logprobs.top_logprobs or [])[1:])
    text, streamed = "", []
    for chunk in client.completions.create(stream=True, **options):
        text += chunk.choices[0].text
        if chunk.choices[0].logprobs is not None:
            streamed += list(zip(*chunk.choices[0].logprobs.model_dump().values(), strict=True))
    assert text == choice.text
    assert streamed == list(zip(*choice.logprobs.model_dump().values(), strict=True))


def test_echo_without_logprobs_and_without_new_tokens_is_the_prompt(echo_client: OpenAI) -> None:
    answer = echo_client.completions.create(model=ECHO, prompt=["abc", "de"], echo=True, max_tokens=0)
    assert [(choice.text, choice.finish_reason, choice.logprobs) for choice in answer.choices] == [
        ("abc", "length", None), ("de", "length", None),
    ]  # fmt: skip
    stream = echo_client.completions.create(model=ECHO, prompt="abc", echo=True, max_tokens=0, stream=True)
    assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in stream] == [("abc", "length")]
    assert echo_client.completions.create(model=ECHO, prompt="abc", echo=True).choices[0].text == "abcabc"


# -- what changes the choice -------------------------------------------------------------------------------------------


def test_a_bias_decides_what_is_said_in_both_endpoints(client: OpenAI, tokenizer: Any) -> None:
    bias = {str(tokenizer.convert_tokens_to_ids("z")): 100, str(tokenizer.convert_tokens_to_ids("y")): -100}
    chat = client.chat.completions.create(model=TRAINABLE, messages=HI, logit_bias=bias, max_tokens=5, logprobs=True)  # type: ignore[arg-type]
    assert chat.choices[0].message.content == "zzzzz"
    assert (
        client.completions.create(model=TRAINABLE, prompt="a", logit_bias=bias, max_tokens=3).choices[0].text == "zzz"
    )  # type: ignore[arg-type]
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert all(token.logprob < -0.01 for token in logprobs.content or ())  # of the model's own distribution


@pytest.mark.parametrize("extra", [{"top_k": 1}, {"min_p": 1.0}, {"top_k": 3, "min_p": 1}])
def test_the_narrowest_filters_are_greedy(client: OpenAI, extra: dict[str, Any]) -> None:
    greedy = client.completions.create(model=TRAINABLE, prompt="one", **GREEDY).choices[0].text
    drawn = client.completions.create(model=TRAINABLE, prompt="one", max_tokens=12, temperature=2, extra_body=extra)
    assert drawn.choices[0].text == greedy
    chat = client.chat.completions.create(model=TRAINABLE, messages=HI, max_tokens=12, temperature=2, extra_body=extra)
    assert chat.choices[0].message.content == (
        client.chat.completions.create(model=TRAINABLE, messages=HI, **GREEDY).choices[0].message.content
    )


def test_filters_may_be_switched_off_as_in_vllm(echo_client: OpenAI) -> None:
    for off in ({"top_k": -1}, {"top_k": 0, "min_p": 0}, {"top_k": None, "min_p": None}):
        assert echo_client.completions.create(model=ECHO, prompt="a", extra_body=off).choices[0].text == "a"


def test_usage_tells_the_cached_tokens(echo_client: OpenAI) -> None:
    usage = echo_client.chat.completions.create(model=ECHO, messages=HI).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),  # outside the vocabulary
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {str(i): 0 for i in range(301)}}, "logit_bias"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"echo": True}, "echo"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ],
)
def test_what_chat_cannot_honour_is_a_400_that_names_the_field(
    echo_client: OpenAI, body: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            echo_client.chat.completions.create(model=ECHO, messages=HI, stream=stream, extra_body=body)
        assert caught.value.param == param, json.dumps(caught.value.body)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"echo": 1}, "echo"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
    ],
)
def test_what_completions_cannot_honour_is_a_400_that_names_the_field(
    echo_client: OpenAI, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        echo_client.completions.create(model=ECHO, prompt="a", extra_body=body)
    assert caught.value.param == param, json.dumps(caught.value.body)
