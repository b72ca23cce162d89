"""POST /v1/decisions through the real client: all three kinds of question, answered by a classifier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from service.platform import Platform
from tests.api.encoders import BINARY, CLASSIFIER, ENCODER, add_encoders
from tests.api.live import ECHO, live_service, sync_client
from tests.engine.encoders import LABELS, ids_of, probabilities

TEXT = "my card was charged twice"
CHOICE: Any = {"type": "choice", "name": "topic", "instructions": "What is it about?"}
SCORE: Any = {"type": "score", "instructions": "How bad is it?"}
PREDICATE: Any = {"type": "predicate", "instructions": "The customer is angry."}


def choices(*values: str | bool) -> dict[str, Any]:
    return {**CHOICE, "choices": [{"value": value} for value in values]}


def levels(*labels: str) -> dict[str, Any]:
    return {**SCORE, "levels": [{"label": label} for label in labels]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OpenAI, dict[str, Path]]]:
    with live_service(tmp_path_factory.mktemp("decisions")) as (platform, url, secret):
        assert isinstance(platform, Platform)
        with sync_client(url, secret) as client:
            yield client, add_encoders(platform)


@pytest.fixture(scope="module")
def client(service: tuple[OpenAI, dict[str, Path]]) -> OpenAI:
    return service[0]


@pytest.fixture(scope="module")
def known(service: tuple[OpenAI, dict[str, Path]]) -> dict[str, float]:
    """Probability of each label, as transformers computes it."""
    return dict(zip(LABELS, probabilities(service[1][CLASSIFIER], TEXT), strict=True))


def ask(client: OpenAI, *questions: Any, model: str = CLASSIFIER, given: Any = TEXT) -> Any:
    return client.decisions.create(model=model, input=given, questions=questions)


def test_a_choice_among_all_labels_has_their_probabilities(client: OpenAI, known: dict[str, float]) -> None:
    decision = ask(client, choices(*LABELS))
    (answer,) = decision.answers
    assert (decision.model, answer.type, answer.name) == (CLASSIFIER, "choice", "topic")
    assert {item.value: item.probability for item in answer.probabilities} == pytest.approx(known, abs=1e-5)
    assert answer.choice == max(known, key=known.__getitem__)
    assert answer.confidence == pytest.approx(max(known.values()), abs=1e-5)
    num_tokens = len(ids_of(TEXT))
    assert (decision.usage.input_tokens, decision.usage.output_tokens) == (num_tokens, 0)
    assert decision.usage.total_tokens == num_tokens


def test_a_choice_among_some_labels_shares_what_they_have(client: OpenAI, known: dict[str, float]) -> None:
    (answer,) = ask(client, choices(LABELS[2], LABELS[0])).answers
    total = known[LABELS[0]] + known[LABELS[2]]
    found = [(item.value, item.probability) for item in answer.probabilities]
    assert [value for value, _ in found] == [LABELS[2], LABELS[0]]
    assert [p for _, p in found] == pytest.approx([known[LABELS[2]] / total, known[LABELS[0]] / total], abs=1e-5)


def test_a_score_is_the_expected_level_counted_from_zero(client: OpenAI, known: dict[str, float]) -> None:
    order = (LABELS[1], LABELS[0], LABELS[2])
    (answer,) = ask(client, levels(*order)).answers
    assert [(item.label, item.value) for item in answer.probabilities] == list(zip(order, range(3), strict=True))
    assert answer.score == pytest.approx(known[order[1]] + 2 * known[order[2]], abs=1e-5)
    assert answer.confidence == pytest.approx(max(known.values()), abs=1e-5)


def test_a_predicate_is_about_the_label_that_it_names(client: OpenAI, known: dict[str, float]) -> None:
    named, worded = {**PREDICATE, "name": LABELS[1]}, {**PREDICATE, "instructions": LABELS[2]}
    answers = ask(client, named, worded).answers
    assert [answer.probability for answer in answers] == pytest.approx([known[LABELS[1]], known[LABELS[2]]], abs=1e-5)
    assert [answer.name for answer in answers] == [LABELS[1], None]


def test_a_classifier_of_yes_and_no_answers_any_predicate_and_booleans(service: Any) -> None:
    client, folders = service
    yes = probabilities(folders[BINARY], TEXT)[1]
    assert ask(client, PREDICATE, model=BINARY).answers[0].probability == pytest.approx(yes, abs=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        [{"role": "user", "content": TEXT}],
        [{"role": "user", "type": "message", "content": [{"type": "input_text", "text": TEXT}]}],
    ],
)
def test_one_user_message_is_the_text_that_it_holds(client: OpenAI, given: Any, known: dict[str, float]) -> None:
    (answer,) = ask(client, choices(*LABELS), given=given).answers
    assert answer.confidence == pytest.approx(max(known.values()), abs=1e-5)


@pytest.mark.parametrize(
    ("question", "param", "message"),
    [
        (choices(LABELS[0], "weather"), "questions[1].choices[1].value", "'billing', 'praise', 'technical'"),
        (choices(LABELS[0], True), "questions[1].choices[1].value", "true is no label"),
        (choices(LABELS[0], LABELS[0]), "questions[1].choices", "same label"),
        (levels("low", LABELS[0]), "questions[1].levels[0].label", "'low' is no label"),
        (levels(LABELS[0], LABELS[0]), "questions[1].levels", "same label"),
        (PREDICATE, "questions[1].name", "name one of its labels"),
    ],
)
def test_a_question_that_the_classifier_cannot_answer_says_what_it_knows(
    client: OpenAI, question: Any, param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(client, choices(*LABELS), question)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("given", "questions", "param"),
    [
        (TEXT, [], "questions"),
        (TEXT, [{"type": "guess", "instructions": "?"}], "questions.0"),
        (TEXT, [choices(LABELS[0])], "questions.0.choices"),
        (TEXT, [{**PREDICATE, "weight": 1}], "questions.0.weight"),
        (TEXT, [{"type": "predicate"}], "questions.0.instructions"),
        ("", [choices(*LABELS)], "input"),
        ([{"role": "system", "content": "Be kind."}], [choices(*LABELS)], "input.0.role"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], [choices(*LABELS)], "input"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], [choices(*LABELS)], "input"),
    ],
)
def test_a_malformed_request_is_a_400_that_names_the_field(
    client: OpenAI, given: Any, questions: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, *questions, given=given)
    assert (caught.value.param or "").startswith(param)


def test_prompt_caching_is_refused_where_it_would_be_dropped(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.decisions.create(
            model=CLASSIFIER, input=TEXT, questions=[choices(*LABELS)], prompt_cache_options={"ttl": "30m"}
        )
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "prompt_cache_options")
    neutral = {"prompt_cache_key": "k", "safety_identifier": "s", "prompt_cache_options": None}
    assert client.decisions.create(model=CLASSIFIER, input=TEXT, questions=[choices(*LABELS)], **neutral).answers  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [ECHO, ENCODER])
def test_a_model_that_is_no_classifier_is_a_404(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="not supported in the v1/decisions endpoint"):
        ask(client, choices(*LABELS), model=model)
