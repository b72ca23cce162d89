"""Tokens to text while they arrive: whole characters only, stop strings across token borders, finish reasons.

Owns everything between a chosen token id and a `Delta`; both engines use it. Knows no model and no sampling.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from service.engine.protocol import Delta, FinishReason, GenerateRequest, TokenLogprob
from service.engine.token_text import REPLACEMENT, Score, TokenDecoder, TokenPieces

_MAX_INCOMPLETE = 3  # an unfinished UTF-8 character is at most 3 bytes; some decoders show one replacement per byte
_MAX_WINDOW = 32  # tokens decoded again per step while only broken bytes arrive; beyond it they are given up as text
_NUM_CONTEXT = 6  # prompt tokens decoded in front of the first new one, so that its leading space is right


class IncrementalDecoder:
    """Text of a growing token list. What it returns is final, and joined up it is the text of all tokens."""

    def __init__(self, decoder: TokenDecoder, prompt_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._ids = list(prompt_ids[-_NUM_CONTEXT:])
        self._num_context = len(self._ids)  # ids[:num_context] is already text, decoded again only for its spaces
        self._num_sent = 0  # characters sent of the tokens behind the context
        self.is_whole = True  # whether the tokens so far end with a whole character

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._pending()
        num_broken = len(text) - len(text.rstrip(REPLACEMENT))
        self.is_whole = num_broken == 0
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


class ScoredText:
    """Incremental text that, where log-probabilities are asked for, also makes an entry of each token."""

    def __init__(self, pieces: TokenPieces, prompt_ids: Sequence[int], *, is_scored: bool) -> None:
        self.num_chars = 0  # that became certain so far, wherever the text begins
        self._pieces = pieces
        self._decoder = IncrementalDecoder(pieces.decoder, prompt_ids)
        self._is_scored = is_scored
        self._entries: deque[TokenLogprob] = deque()

    def push(self, token_id: int, score: Score | None, prefix: str = "") -> str:
        """Text that became certain with this token, `prefix` in front; the token's entry waits for `release`."""
        was_whole, offset = self._decoder.is_whole, self.num_chars
        fresh = prefix + self._decoder.push(token_id)
        self.num_chars += len(fresh)
        if self._is_scored:
            is_whole = was_whole and self._decoder.is_whole
            if not was_whole and REPLACEMENT not in (own := self._pieces[token_id].token) and fresh.endswith(own):
                offset = self.num_chars - len(own)  # behind the replacement of a character that it did not complete
            self._entries.append(self._pieces.entry(token_id, score, offset, text=fresh if is_whole else None))
        return fresh

    def push_end(self, token_id: int, score: Score | None) -> None:
        """The entry of a stop token, which is no text."""
        if self._is_scored:
            self._entries.append(self._pieces.entry(token_id, score, self.num_chars, is_text=False))

    def flush(self) -> str:
        """See IncrementalDecoder.flush."""
        return self._decoder.flush()

    def release(self, end: int | None) -> tuple[TokenLogprob, ...]:
        """The entries not yet released of the tokens that begin before character `end`; of all, if it is None."""
        if not self._entries:
            return ()
        num = len(self._entries) if end is None else sum(entry.offset < end for entry in self._entries)
        return tuple(self._entries.popleft() for _ in range(num))


class Echo(NamedTuple):
    """A prompt as output."""

    text: str
    logprobs: tuple[TokenLogprob, ...]


def echo_of(pieces: TokenPieces, request: GenerateRequest, scores: Sequence[Score] | None) -> Echo | None:
    """The prompt's text as its tokens read, if the request asks for it; `scores` are of its tokens but the first."""
    if not request.echo:
        return None
    prompt_ids = request.prompt_token_ids
    if scores is None:
        return Echo(pieces.decoder.decode(prompt_ids), ())
    text = ScoredText(pieces, (), is_scored=True)
    parts = [text.push(token_id, score) for token_id, score in zip(prompt_ids, (None, *scores), strict=True)]
    return Echo("".join(parts) + text.flush(), text.release(None))


class ChoiceText:
    """One choice of a request: takes token ids, gives deltas, knows when and why the choice ends."""

    def __init__(
        self,
        pieces: TokenPieces,
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
        self._text = ScoredText(pieces, request.prompt_token_ids, is_scored=request.sampling.logprobs is not None)
        self._matcher = StopMatcher(request.sampling.stop)
        self._stop_token_ids = stop_token_ids
        self._num_unsent = 0
        self._num_sent_chars = 0
        self._prefix = prefix

    def begin(self, echo: Echo | None) -> Delta | None:
        """The prompt has been read: the prompt as output where asked for, and the end if no token is to follow."""
        reason: FinishReason | None = "length" if self._left <= 0 else None
        self.finish_reason = reason
        if echo is None:
            return None if reason is None else Delta(self.index, "", 0, reason)
        self._text.num_chars = self._num_sent_chars = len(echo.text)
        return Delta(self.index, echo.text, 0, reason, echo.logprobs)

    def push(self, token_id: int, score: Score | None = None, *, last: bool = False) -> Delta | None:
        """Take one token; None while there is nothing to send. `last` ends the choice with "stop" after this token."""
        assert self.finish_reason is None, "a token for a finished choice"
        self._left -= 1
        self._num_unsent += 1
        if token_id in self._stop_token_ids:
            self._text.push_end(token_id, score)
            return self._finish("stop", "")
        sent, stopped = self._matcher.push(self._text.push(token_id, score, self._prefix))
        self._prefix = ""
        if stopped:
            return self._delta(sent, "stop", is_cut=True)
        if self._left <= 0:
            return self._finish("length", sent)
        if last:
            return self._finish("stop", sent)
        return self._delta(sent, None) if sent else None

    def _finish(self, reason: FinishReason, sent: str) -> Delta:
        """End by a token: incomplete characters and held text are sent after all."""
        tail, stopped = self._matcher.push(self._text.flush())
        if stopped:
            return self._delta(sent + tail, "stop", is_cut=True)
        return self._delta(sent + tail + self._matcher.flush(), reason)

    def _delta(self, text: str, reason: FinishReason | None, *, is_cut: bool = False) -> Delta:
        self.finish_reason = reason
        num_tokens, self._num_unsent = self._num_unsent, 0
        self._num_sent_chars += len(text)
        is_whole = reason is not None and not is_cut
        logprobs = self._text.release(None if is_whole else self._num_sent_chars)
        return Delta(self.index, text, num_tokens, reason, logprobs)
