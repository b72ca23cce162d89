"""Log-probabilities of tokens in OpenAI's two forms: chat's list of tokens, and the older one's parallel lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.engine.protocol import TokenLogprob

_LEAST = -9999.0  # OpenAI's value for what is as good as impossible; JSON has no infinity


def chat_content(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """`logprobs.content`: the tokens of the text, so no special ones; their `bytes` joined up are the text."""
    return [
        {
            **_chat_token(token.token, token.raw, token.logprob),
            "top_logprobs": [_chat_token(top.token, top.raw, top.logprob) for top in token.top],
        }
        for token in tokens
        if token.raw is not None
    ]


def _chat_token(token: str, raw: bytes | None, logprob: float | None) -> dict[str, Any]:
    return {"token": token, "bytes": None if raw is None else list(raw), "logprob": _finite(logprob)}


def completion_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`logprobs` of a text completion: every token, the one that ended it included.

    `top_logprobs` holds the likeliest tokens and the token itself, by name; of two with one name, the likelier.
    """
    return {
        "tokens": [_name(token.token, token.raw) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [_by_name(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _by_name(token: TokenLogprob) -> dict[str, float | None] | None:
    """None for the first token of a prompt, which nothing predicts."""
    if token.logprob is None:
        return None
    named: dict[str, float | None] = {}
    for top in token.top:
        named.setdefault(_name(top.token, top.raw), _finite(top.logprob))
    named.setdefault(_name(token.token, token.raw), _finite(token.logprob))
    return named


def _name(token: str, raw: bytes | None) -> str:
    """The token's text; parts of characters by their bytes, as OpenAI writes them, so that names differ."""
    if raw is None or token.encode() == raw:
        return token
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST)
