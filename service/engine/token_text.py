"""What single tokens are as text, for log-probabilities: their bytes, their names, and the entries made of them.

Works with any decoder, without knowing its kind: a token's text is what it adds to a text. Owns no stream; `ChoiceText`
decides which entries are sent when.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol

from service.engine.protocol import TokenLogprob, TopLogprob

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenDecoder(Protocol):
    """The part of `tokenizers.Tokenizer` that is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some tokens."""
        ...

    def id_to_token(self, id: int) -> str | None:
        """How the vocabulary writes a token."""
        ...


class Score(NamedTuple):
    """How likely the model held a token, and which tokens it held likeliest: (id, log-probability), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """A token by itself."""

    token: str
    raw: bytes | None  # None for special tokens, which are no text


class TokenPieces:
    """The pieces of one vocabulary; each is worked out once."""

    def __init__(self, decoder: TokenDecoder) -> None:
        self.decoder = decoder
        self._pieces: dict[int, Piece] = {}

    def __getitem__(self, token_id: int) -> Piece:
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._work_out(token_id)
        return piece

    def name(self, token_id: int) -> str:
        """A special token as its vocabulary writes it."""
        return self.decoder.decode([token_id], skip_special_tokens=False)

    def entry(
        self, token_id: int, score: Score | None, offset: int, *, text: str | None = None, is_text: bool = True
    ) -> TokenLogprob:
        """A token with its score. `text` is what it added, where that is known better than from the token alone."""
        if not is_text:
            token, raw = self.name(token_id), None
        elif text:
            token, raw = text, text.encode()
        else:
            token, raw = self[token_id]
        if score is None:
            return TokenLogprob(token, raw, None, (), offset)
        top = tuple(TopLogprob(*self[top_id], logprob) for top_id, logprob in score.top)
        return TokenLogprob(token, raw, score.logprob, top, offset)

    def _work_out(self, token_id: int) -> Piece:
        # Twice in a row, because decoders strip the space in front of a first word.
        once = self.decoder.decode([token_id])
        text = self.decoder.decode([token_id, token_id])[len(once) :]
        if REPLACEMENT in text:
            raw = _vocabulary_bytes(self.decoder.id_to_token(token_id) or "")
            return Piece(text, text.encode()) if raw is None else Piece(raw.decode(errors="replace"), raw)
        return Piece(text, text.encode()) if text else Piece(self.name(token_id), None)


def _vocabulary_bytes(token: str) -> bytes | None:
    """The bytes of a token that holds parts of characters, from how vocabularies write it; None if in no known way."""
    if match := _BYTE_TOKEN.fullmatch(token):  # sentencepiece's byte fallback
        return bytes([int(match[1], 16)])
    alphabet = _byte_level_alphabet()
    return bytes(alphabet[char] for char in token) if token and all(char in alphabet for char in token) else None


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level vocabularies: printable Latin-1 stands for itself, the others follow
    from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
