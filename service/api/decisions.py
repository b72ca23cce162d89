"""POST /v1/decisions in OpenAI's shape, answered by a classifier.

A classifier knows one question, the one that it was trained for, and its labels are the possible answers. So:

- *choice*: every value is a label (`true` and `false` also stand for labels of that name). The answer is the likeliest
  of them, and the probabilities are those of the labels given that it is one of these.
- *score*: every level is a label. Levels count from 0; the score is the expected level, again given that it is one of
  these.
- *predicate*: the statement "the label is L". L is the question's name, or its instructions, if that is a label.
  Failing that, a model whose two labels are a yes and a no (yes/no, true/false, 1/0, positive/negative) says how likely
  yes is.

`confidence` is the largest of the probabilities. Instructions and descriptions beyond that are not read. A question
that fits none of this is a 400, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.deps import InferenceDep, PlatformDep
from service.api.encoder_schemas import (
    DECISIONS_NEUTRAL,
    AnyQuestion,
    ChoiceQuestion,
    DecisionsRequest,
    Predicate,
    ScoreQuestion,
)
from service.api.encoding import respond
from service.api.generation import require, resolve
from service.api.inference_schemas import parse
from service.api.paging import refuse_unknown_query
from service.errors import InvalidRequest
from service.serving.messages import Encoded

router = APIRouter(tags=["inference"])

MAX_LABELS_SHOWN = 20
_YES_AND_NO = ({"yes", "no"}, {"true", "false"}, {"1", "0"}, {"positive", "negative"})
_YES = {"yes", "true", "1", "positive"}

LogProbabilities = dict[str, float]  # by label


@router.post("/v1/decisions", response_model=None)
async def decide(request: Request, platform: PlatformDep, caller: InferenceDep) -> Response:
    """Answer questions about one input."""
    refuse_unknown_query(request)
    body = parse(DecisionsRequest, await request.body(), DECISIONS_NEUTRAL)
    target = await resolve(platform, caller, body.model)
    require(target, "classify", "v1/decisions")

    def answer(encoded: Encoded) -> dict[str, Any]:
        found = dict(zip(encoded.labels, encoded.rows[0].tolist(), strict=True))
        answers = [_answer(question, f"questions[{i}]", found) for i, question in enumerate(body.questions)]
        return {"model": target.model_id, "answers": answers, "usage": _usage(encoded.num_tokens)}

    return await respond(request, platform, caller, target, body.text(), answer)


def _answer(question: AnyQuestion, param: str, found: LogProbabilities) -> dict[str, Any]:
    """One question's answer; InvalidRequest names what the classifier cannot answer."""
    head = {"type": question.type, "name": question.name}
    if isinstance(question, Predicate):
        return {**head, "probability": math.exp(found[_stated(question, param, found)])}
    if isinstance(question, ChoiceQuestion):
        values = [choice.value for choice in question.choices]
        labels = [_chosen(value, f"{param}.choices[{i}].value", found) for i, value in enumerate(values)]
        shares = _shares(labels, f"{param}.choices", found)
        best = max(range(len(values)), key=shares.__getitem__)
        probabilities = [{"value": v, "probability": p} for v, p in zip(values, shares, strict=True)]
        return {**head, "choice": values[best], "confidence": shares[best], "probabilities": probabilities}
    return {**head, **_score(question, param, found)}


def _score(question: ScoreQuestion, param: str, found: LogProbabilities) -> dict[str, Any]:
    labels = [level.label for level in question.levels]
    for i, label in enumerate(labels):
        if label not in found:
            raise _unknown(f"{param}.levels[{i}].label", f"'{label}' is no label of this model", found)
    shares = _shares(labels, f"{param}.levels", found)
    levels = [{"label": labels[i], "value": i, "probability": share} for i, share in enumerate(shares)]
    expected = sum(i * share for i, share in enumerate(shares))
    return {"score": expected, "confidence": max(shares), "probabilities": levels}


def _stated(question: Predicate, param: str, found: LogProbabilities) -> str:
    """The label whose probability a predicate asks for."""
    for text in (question.name, question.instructions):
        if isinstance(text, str) and text in found:
            return text
    if {label.lower() for label in found} in _YES_AND_NO:
        return next(label for label in found if label.lower() in _YES)
    problem = "this model is a classifier: name one of its labels as the question's 'name', or as its instructions"
    raise _unknown(f"{param}.name", problem, found)


def _chosen(value: str | bool, param: str, found: LogProbabilities) -> str:
    """The label that a value stands for."""
    if isinstance(value, str):
        matching = [value] if value in found else []
    else:
        matching = [label for label in found if label.lower() == str(value).lower()]
    if len(matching) == 1:
        return matching[0]
    shown = f"'{value}'" if isinstance(value, str) else str(value).lower()
    raise _unknown(param, f"{shown} is no label of this model", found)


def _shares(labels: Sequence[str], param: str, found: LogProbabilities) -> list[float]:
    """Probabilities of some labels, given that it is one of them; their sum is 1."""
    if len(set(labels)) < len(labels):
        raise InvalidRequest(f"Invalid value for '{param}': two of them stand for the same label.", param=param)
    largest = max(found[label] for label in labels)
    weights = [math.exp(found[label] - largest) for label in labels]
    total = sum(weights)
    return [weight / total for weight in weights]


def _unknown(param: str, problem: str, found: LogProbabilities) -> InvalidRequest:
    labels = ", ".join(f"'{label}'" for label in list(found)[:MAX_LABELS_SHOWN])
    more = f" and {len(found) - MAX_LABELS_SHOWN} more" if len(found) > MAX_LABELS_SHOWN else ""
    return InvalidRequest(f"Invalid value for '{param}': {problem}. It has {labels}{more}.", param=param)


def _usage(num_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": num_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_tokens,
    }
