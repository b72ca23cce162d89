"""Tokens to text while they arrive: whole characters only, stop strings across token borders, finish reasons.

Owns everything between a chosen token id and a `Delta`; both engines use it. Knows no model and no sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from service.engine.protocol import Delta, FinishReason, GenerateRequest

_REPLACEMENT = "\ufffd"
_MAX_INCOMPLETE = 3  # an unfinished UTF-8 character is at most 3 bytes; some decoders show one replacement per byte
_MAX_WINDOW = 32  # tokens decoded again per step while only broken bytes arrive; beyond it they are given up as text
_NUM_CONTEXT = 6  # prompt tokens decoded in front of the first new one, so that its leading space is right


class TokenDecoder(Protocol):
    """The part of `tokenizers.Tokenizer` that is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some tokens."""
        ...


class IncrementalDecoder:
    """Text of a growing token list. What it returns is final, and joined up it is the text of all tokens."""

    def __init__(self, decoder: TokenDecoder, prompt_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._ids = list(prompt_ids[-_NUM_CONTEXT:])
        self._num_context = len(self._ids)  # ids[:num_context] is already text, decoded again only for its spaces
        self._num_sent = 0  # characters sent of the tokens behind the context

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._pending()
        num_broken = len(text) - len(text.rstrip(_REPLACEMENT))
        if num_broken == 0:
            fresh = text[self._num_sent :]
            # An empty window (special tokens only) keeps its context: decoders strip the space of a first word.
            if text or len(self._ids) > _MAX_WINDOW:
                self._move_window()
            return fresh
        end = len(text) - min(num_broken, _MAX_INCOMPLETE)
        fresh = text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        if len(self._ids) - self._num_context > _MAX_WINDOW:
            fresh += text[self._num_sent :]
            self._move_window()
        return fresh

    def flush(self) -> str:
        """The rest at the end of generation; an incomplete character becomes U+FFFD, as in a whole decode."""
        fresh = self._pending()[self._num_sent :]
        self._move_window()
        return fresh

    def _pending(self) -> str:
        """Text of the tokens behind the context."""
        context = self._decoder.decode(self._ids[: self._num_context], skip_special_tokens=True)
        return self._decoder.decode(self._ids, skip_special_tokens=True)[len(context) :]

    def _move_window(self) -> None:
        self._ids = self._ids[self._num_context :] or self._ids
        self._num_context = len(self._ids)
        self._num_sent = 0


class StopMatcher:
    """Cuts a text stream before the first stop string, holding back what may still become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text to send, whether a stop string was met). The match that is complete first wins, whatever the chunks."""
        if not self._stops:
            return text, False
        self._held += text
        matches = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if matches:
            _, start = min(matches)
            sent, self._held = self._held[:start], ""
            return sent, True
        num_held = max(self._num_prefix(stop) for stop in self._stops)
        cut = len(self._held) - num_held
        sent, self._held = self._held[:cut], self._held[cut:]
        return sent, False

    def flush(self) -> str:
        """What was held back, when no stop string came of it."""
        sent, self._held = self._held, ""
        return sent

    def _num_prefix(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0


class ChoiceText:
    """One choice of a request: takes token ids, gives deltas, knows when and why the choice ends."""

    def __init__(
        self,
        decoder: TokenDecoder,
        request: GenerateRequest,
        index: int,
        *,
        stop_token_ids: frozenset[int],
        max_context: int,
        prefix: str = "",
    ) -> None:
        """`prefix` is text sent in front of the first token's (used by the echo engine to name the adapter)."""
        self.index = index
        self.finish_reason: FinishReason | None = None
        self._left = min(request.sampling.max_tokens, max_context - len(request.prompt_token_ids))
        self._decoder = IncrementalDecoder(decoder, request.prompt_token_ids)
        self._matcher = StopMatcher(request.sampling.stop)
        self._stop_token_ids = stop_token_ids
        self._num_unsent = 0
        self._prefix = prefix

    def push(self, token_id: int, *, last: bool = False) -> Delta | None:
        """Take one token; None while there is nothing to send. `last` ends the choice with "stop" after this token."""
        assert self.finish_reason is None, "a token for a finished choice"
        self._left -= 1
        self._num_unsent += 1
        if token_id in self._stop_token_ids:
            return self._finish("stop", "")
        sent, stopped = self._matcher.push(self._prefix + self._decoder.push(token_id))
        self._prefix = ""
        if stopped:
            return self._delta(sent, "stop")
        if self._left <= 0:
            return self._finish("length", sent)
        if last:
            return self._finish("stop", sent)
        return self._delta(sent, None) if sent else None

    def _finish(self, reason: FinishReason, sent: str) -> Delta:
        """End by a token: incomplete characters and held text are sent after all."""
        tail, stopped = self._matcher.push(self._decoder.flush())
        if stopped:
            return self._delta(sent + tail, "stop")
        return self._delta(sent + tail + self._matcher.flush(), reason)

    def _delta(self, text: str, reason: FinishReason | None) -> Delta:
        self.finish_reason = reason
        num_tokens, self._num_unsent = self._num_unsent, 0
        return Delta(self.index, text, num_tokens, reason)
