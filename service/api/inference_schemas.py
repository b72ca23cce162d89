"""Wire types of chat completions and completions: what is honoured, what is refused by name, what may be neutral.

A field of OpenAI's that we do not implement is accepted only with the value that means "as without it".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from service.api.schemas import ObjectId, Wire
from service.errors import InvalidRequest, UnsupportedParameter
from training.records import ChatMessage
from training.records import ToolCall as RecordedToolCall

MAX_CHOICES: Final = 128
MAX_PROMPTS: Final = 128
MAX_BIASED_TOKENS: Final = 300
MAX_TOP_LOGPROBS: Final = 20
MAX_COMPLETION_LOGPROBS: Final = 5
DEFAULT_COMPLETION_TOKENS: Final = 16  # OpenAI's default for the legacy endpoint

# Field -> values that ask for nothing; null always does.
Neutral = Mapping[str, tuple[Any, ...]]
CHAT_NEUTRAL: Final[Neutral] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
COMPLETION_NEUTRAL: Final[Neutral] = {
    "suffix": ("",),
}

Body = TypeVar("Body", bound=Wire)


def parse(model: type[Body], body: bytes, neutral: Neutral) -> Body:
    """The request in the body; InvalidRequest, UnsupportedParameter or RequestValidationError name what is wrong."""
    try:
        raw = json.loads(body.decode())  # from bytes, json takes encodings and half characters that JSON does not have
        if b"\\u" in body:
            json.dumps(raw, ensure_ascii=False).encode()  # an escaped half of a surrogate pair is no character
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_type")
    for name in neutral.keys() & raw.keys():
        if not _is_neutral(raw.pop(name), neutral[name]):
            raise UnsupportedParameter(f"Unsupported parameter: '{name}' is not supported by this service.", param=name)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults, body=raw) from None


def _is_neutral(value: Any, accepted: tuple[Any, ...]) -> bool:
    return value is None or any(type(value) is type(other) and value == other for other in accepted)


def _no_obfuscation(value: Any) -> Any:
    if value is True:
        raise PydanticCustomError(
            "unsupported_parameter", "Unsupported parameter: 'include_obfuscation' must be false."
        )
    return value


class StreamOptions(Wire):
    """What a stream holds beside its chunks."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, BeforeValidator(_no_obfuscation)] = None


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4), BeforeValidator(_stop_list)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def _token_id_keys(value: Any) -> Any:
    """JSON's keys are strings; those of a bias are token ids."""
    if not isinstance(value, dict):
        return value
    if wrong := next((key for key in value if not (key.isascii() and key.isdigit())), None):
        raise ValueError(f"its keys must be token ids, but one is '{wrong[:40]}'")
    return {int(key): bias for key, bias in value.items()}


LogitBias = Annotated[
    dict[Annotated[int, Field(lt=2**31)], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASED_TOKENS),
    BeforeValidator(_token_id_keys),
]


class Sampling(Wire):
    """What both endpoints share. `user`, `safety_identifier` and `prompt_cache_key` never change an answer; `top_k` and
    `min_p` are not OpenAI's, and mean what they mean in vLLM (-1 and 0 leave them out)."""

    model: ObjectId
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise InvalidRequest(message, param="stream_options")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def _only_text(value: Any) -> Any:
    if isinstance(value, str) and value != "text":
        why = f"Unsupported content part of type '{value}': this service takes text only."
        raise PydanticCustomError("unsupported_parameter", "{why}", {"why": why})
    return value


def _nothing(value: Any) -> Any:
    if value:
        raise PydanticCustomError("unsupported_parameter", "Unsupported parameter: this field must be empty here.")
    return None


Nothing = Annotated[None, BeforeValidator(_nothing)]


class TextPart(Wire):
    """A piece of a message."""

    type: Annotated[Literal["text"], BeforeValidator(_only_text)]
    text: str


def _join_parts(content: str | list[TextPart] | None) -> str | None:
    return "".join(part.text for part in content) if isinstance(content, list) else content


class FunctionCall(Wire):
    """The function that an assistant called."""

    name: str
    arguments: str
    parsed_arguments: Nothing = None  # the client's stream() and parse() add it


class ToolCall(Wire):
    """A call in the history."""

    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None  # left over when a streamed call is sent back


class Message(Wire):
    """One turn; also as an answer's `message` sent back, with its fields that are always empty here."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart] | None, AfterValidator(_join_parts)] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: Nothing = None
    parsed: Nothing = None  # the client's stream() and parse() add it
    audio: Nothing = None
    function_call: Nothing = None

    @model_validator(mode="after")
    def _complete(self) -> Message:
        is_assistant = self.role == "assistant"
        if self.content is None and not (is_assistant and (self.tool_calls or self.refusal)):
            raise ValueError(f"a message of role '{self.role}' needs 'content'")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role 'tool' needs 'tool_call_id'")
        for name, role in (("tool_calls", "assistant"), ("refusal", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                raise ValueError(f"only messages of role '{role}' may have '{name}'")
        return self

    def to_record(self) -> ChatMessage:
        """The type that training renders."""
        extra: Any = {"index": True, "function": {"parsed_arguments"}}
        calls = [RecordedToolCall.model_validate(call.model_dump(exclude=extra)) for call in self.tool_calls or ()]
        assert not isinstance(self.content, list)
        return ChatMessage(
            role=self.role,
            content=self.content,
            name=self.name,
            tool_calls=tuple(calls) or None,
            tool_call_id=self.tool_call_id,
            refusal=self.refusal,
        )


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            message = "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."
            raise InvalidRequest(message, param="top_logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported."
            raise InvalidRequest(message, param="max_tokens")
        return self


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _nothing_needs_echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            message = "Invalid value for 'max_tokens': 0 is only allowed with 'echo', or nothing would be answered."
            raise InvalidRequest(message, param="max_tokens")
        return self

    @model_validator(mode="after")
    def _few_prompts(self) -> CompletionRequest:
        if len(self.prompts()) > MAX_PROMPTS:
            message = f"Invalid value for 'prompt': at most {MAX_PROMPTS} prompts are allowed in one request."
            raise InvalidRequest(message, param="prompt")
        return self

    @model_validator(mode="after")
    def _no_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            message = "Unsupported parameter: 'best_of' is not supported by this service, unless it equals 'n'."
            raise UnsupportedParameter(message, param="best_of")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, whichever of the four forms they came in."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt
