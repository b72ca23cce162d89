"""Wire types of classify, decisions and embeddings: what is honoured, what is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from service.api.inference_schemas import Neutral, TokenIds
from service.api.schemas import ObjectId, Text, Wire
from service.errors import InvalidRequest

MAX_INPUTS: Final = 2048  # OpenAI's limit
CLASSIFY_NEUTRAL: Final[Neutral] = {}
EMBEDDINGS_NEUTRAL: Final[Neutral] = {"dimensions": ()}  # cutting needs a model that was trained for it (Matryoshka)
DECISIONS_NEUTRAL: Final[Neutral] = {"prompt_cache_options": ()}

NonEmpty = Annotated[Text, Field(min_length=1)]
Item = TypeVar("Item")
Filled = Annotated[list[Item], Field(min_length=1)]


class ClassifyRequest(Wire):
    """Body of POST /v1/classify. Without `top_k` all labels are told."""

    model: ObjectId
    input: NonEmpty | Annotated[Filled[NonEmpty], Field(max_length=MAX_INPUTS)]
    top_k: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class EmbeddingsRequest(Wire):
    """Body of POST /v1/embeddings. Token ids are taken as they are, special tokens included."""

    model: ObjectId
    input: NonEmpty | TokenIds | Filled[NonEmpty] | Filled[TokenIds]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @model_validator(mode="after")
    def _few_inputs(self) -> EmbeddingsRequest:
        if not isinstance(self.input, str) and not isinstance(self.input[0], int) and len(self.input) > MAX_INPUTS:
            message = f"Invalid value for 'input': at most {MAX_INPUTS} inputs are allowed in one request."
            raise InvalidRequest(message, param="input")
        return self


def _only_text(value: Any) -> Any:
    if isinstance(value, str) and value != "input_text":
        why = f"Unsupported content part of type '{value}': a classifier reads text only."
        raise PydanticCustomError("unsupported_parameter", "{why}", {"why": why})
    return value


def _only_user(value: Any) -> Any:
    if isinstance(value, str) and value != "user":
        why = f"Unsupported role '{value}': a classifier reads one text, the content of one user message."
        raise PydanticCustomError("unsupported_parameter", "{why}", {"why": why})
    return value


class TextPart(Wire):
    """A piece of text."""

    type: Annotated[Literal["input_text"], BeforeValidator(_only_text)]
    text: Text


def _join_parts(content: str | list[TextPart]) -> str:
    joined = content if isinstance(content, str) else "".join(part.text for part in content)
    if not joined:
        raise ValueError("it must not be empty")
    return joined


Content = Annotated[Text | list[TextPart], AfterValidator(_join_parts)]


class UserMessage(Wire):
    """The text to decide on, in the form of a message."""

    role: Annotated[Literal["user"], BeforeValidator(_only_user)]
    content: Content
    type: Literal["message"] = "message"


class Question(Wire):
    """What all questions have. `description`s and instructions explain a question to a language model; a classifier
    has learned its one question in training, and answers by its labels."""

    instructions: Content
    name: Text | None = None


class Predicate(Question):
    """How likely it is that a statement about the input is true."""

    type: Literal["predicate"]


class Choice(Wire):
    """One of the values to choose from."""

    value: Text | bool
    description: Text | None = None


class ChoiceQuestion(Question):
    """Which of the values fits the input best."""

    type: Literal["choice"]
    choices: Annotated[list[Choice], Field(min_length=2, max_length=255)]


class Level(Wire):
    """One step of a scale."""

    label: Text
    description: Text | None = None


class ScoreQuestion(Question):
    """Where the input stands on a scale whose levels are given in their order."""

    type: Literal["score"]
    levels: Annotated[list[Level], Field(min_length=2, max_length=10)]


AnyQuestion = Annotated[Predicate | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")]


class DecisionsRequest(Wire):
    """Body of POST /v1/decisions. `safety_identifier` and `prompt_cache_key` never change an answer."""

    model: ObjectId
    input: NonEmpty | Annotated[list[UserMessage], Field(min_length=1, max_length=1)]
    questions: Annotated[list[AnyQuestion], Field(min_length=1, max_length=400)]
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    def text(self) -> str:
        """What the classifier reads."""
        if isinstance(self.input, str):
            return self.input
        content = self.input[0].content
        assert isinstance(content, str), "parts were joined when the body was read"
        return content
