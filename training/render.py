"""Records and prompts to tokens with a loss mask: the one truth for training and serving.

A `Renderer` is loaded from the tokenizer files that lie beside the weights, in a base as in an artifact, and gives the
same ids as transformers' `AutoTokenizer.apply_chat_template`, with control tokens in user text kept as plain text
(its `sanitize_control_tokens`). The loss mask comes from character offsets over the whole rendered text: pieces are
never tokenised apart. Imports neither torch nor Ray; `training.template` knows the chat template.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from training.artifact import Fingerprint, canonical_json
from training.records import ChatRecord, ClassificationRecord, CompletionRecord, Sequence, WholeText
from training.template import TOKEN_END, TOKEN_START, ChatTemplate, RenderError, Span
from training.tokenizer_files import add_missing_tokens, named_tokens, read_json, set_post_processor, templates

__all__ = ["TOKENIZER_FILES", "Example", "RenderError", "Renderer"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "generation_config.json")  # fmt: skip
_MARKED = re.compile(f"{TOKEN_START}([^{TOKEN_START}{TOKEN_END}]*){TOKEN_END}|[{TOKEN_START}{TOKEN_END}]")
_BATCH = 256  # records rendered before their texts are encoded together


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens of one record; `trained[i]` says whether predicting token i counts. The first token never does: there is
    nothing before it to predict it from."""

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A chat record as text, before it is encoded."""

    text: str
    spans: list[Span]


class Renderer:
    """Tokenizer, special tokens and chat template of one base."""

    def __init__(self, tokenizer: Tokenizer, special_tokens: dict[str, str], template: str | None, *,
                 tool_template: str | None = None, stop_token_ids: Iterable[int] = ()) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.special_tokens = special_tokens
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.has_chat_template = template is not None
        self._tokenizer_hash = _sha256(tokenizer.to_str().encode())
        # Offsets of whole tokens, white space included, are wanted; only a ByteLevel post-processor trims them.
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.post_processor = None
        eos = special_tokens.get("eos_token")
        self.stop_token_ids = _unique([tokenizer.token_to_id(eos) if eos else None, *stop_token_ids])
        self.eos_token_id: int | None = self.stop_token_ids[0] if self.stop_token_ids else None
        added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
        self._template: ChatTemplate | None = None
        if template is not None:
            stops = {text for id in self.stop_token_ids if (text := tokenizer.id_to_token(id)) in added}
            self._template = ChatTemplate(template, tool_template, special_tokens, added, stops)
            self._add_stop_of_template(added, tool_template, template)

    def _add_stop_of_template(self, added: dict[str, bool], tool_template: str | None, template: str) -> None:
        """The special token that ends assistant turns ends an answer too, also where the configuration forgot it (a
        ChatML template on a base whose eos is <|endoftext|>): it is what the model learns to stop with."""
        assert self._template is not None
        text = self._template.turn_end()
        ending = self.tokenizer.token_to_id(text) if text else None
        if ending is not None and ending not in self.stop_token_ids:
            self.stop_token_ids = (*self.stop_token_ids, ending)
            stops = {text for id in self.stop_token_ids if (text := self.tokenizer.id_to_token(id)) in added}
            self._template = ChatTemplate(template, tool_template, self.special_tokens, added, stops)

    @classmethod
    def load(cls, folder: Path) -> Renderer:
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers reads them."""
        config = read_json(folder / "tokenizer_config.json")
        special = named_tokens({**read_json(folder / "special_tokens_map.json"), **config})
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception; the message is all there is
            raise RenderError(f"tokenizer.json cannot be read: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        add_missing_tokens(tokenizer, config, special)
        if "add_bos_token" in config or "add_eos_token" in config:
            set_post_processor(tokenizer, config, special)
        template, tool_template = templates(folder, config)
        stops: list[int] = []
        for name in ("generation_config.json", "config.json"):
            ids = read_json(folder / name).get("eos_token_id")
            stops += ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []
        return cls(tokenizer, special, template, tool_template=tool_template, stop_token_ids=stops)

    # -- serving -------------------------------------------------------------------------------------------------------

    def encode_prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Ids of a conversation up to where the assistant answers. RenderError if the template cannot express it."""
        return self._encode_marked(self._chat_template().prompt(messages, tools))[0]

    def encode_text(self, text: str) -> list[int]:
        """Ids of raw text with the special tokens that the tokenizer puts in front, such as bos. What it would append
        (an eos, with some) is left off: the text is to be continued."""
        encoding = self.tokenizer.encode(text, add_special_tokens=True)
        return encoding.ids[: len(encoding.ids) - _num_appended(encoding)]

    def encode_whole(self, text: str) -> list[int]:
        """Ids of a text that nothing is to follow, with all the tokenizer's special tokens ([CLS] and [SEP], with
        some): what transformers' `AutoTokenizer` gives. It is what encoders and classifiers read."""
        return self.tokenizer.encode(text, add_special_tokens=True).ids

    # -- training ------------------------------------------------------------------------------------------------------

    def encode_example(self, record: Sequence) -> Example:
        """Tokens and loss mask of one record. RenderError if the template cannot express it or nothing is trained."""
        (outcome,) = self.encode_examples([record])
        if isinstance(outcome, RenderError):
            raise outcome
        return outcome

    def encode_examples(self, records: Iterable[Sequence]) -> Iterator[Example | RenderError]:
        """The same for many records, encoded in batches; a record that fails gives its error in its place."""
        source = iter(records)
        while batch := list(islice(source, _BATCH)):
            staged = [self._stage(record) for record in batch]
            plain = [s.text for s in staged if isinstance(s, _Rendered) and not _MARKED.search(s.text)]
            encodings = iter(self._plain.encode_batch(plain, add_special_tokens=False))
            for stage in staged:
                yield self._finish(stage, encodings) if isinstance(stage, _Rendered) else stage

    def _stage(self, record: Sequence) -> _Rendered | Example | RenderError:
        try:
            if isinstance(record, ChatRecord):
                return self._render_chat(record)
            if isinstance(record, CompletionRecord):
                return self._completion(record)
            if isinstance(record, ClassificationRecord | WholeText):
                return self._whole(record.text)
            ids = self.encode_text(record.text)
            num_front = len(ids) - len(self._plain.encode(record.text, add_special_tokens=False).ids)
            return self._with_eos(ids, max(num_front, 0))
        except RenderError as error:
            return error

    def _render_chat(self, record: ChatRecord) -> _Rendered:
        messages = [message.model_dump(mode="json", exclude_none=True) for message in record.messages]
        trained = [message.role == "assistant" and message.weight != 0 for message in record.messages]
        if not any(trained):
            raise RenderError("nothing to train on: no assistant message with a weight other than 0")
        text, spans = self._chat_template().example(messages, list(record.tools) if record.tools else None, trained)
        return _Rendered(text, spans)

    def _finish(self, rendered: _Rendered, encodings: Iterator[Encoding]) -> Example | RenderError:
        """Encode and mask: a token is trained if it starts within a span. One that straddles the start is not: part of
        it stands in the prompt, so the model is never asked for it."""
        try:
            if _MARKED.search(rendered.text):
                ids, starts = self._encode_marked(rendered.text)
            else:
                encoding = next(encodings)
                ids, starts = encoding.ids, [start for start, _ in encoding.offsets]
        except RenderError as error:
            return error
        trained = [False] * len(ids)
        for begin, end in rendered.spans:
            for position in range(bisect_left(starts, begin), bisect_left(starts, end)):
                trained[position] = True
        if trained:
            trained[0] = False
        if not any(trained):
            return RenderError("nothing to train on: the chat template writes no text for the assistant's messages")
        return Example(tuple(ids), tuple(trained))

    def _completion(self, record: CompletionRecord) -> Example:
        """The prompt's ids are those that serving will send, also where a token would span prompt and completion."""
        prompt, whole = self.encode_text(record.prompt), self.encode_text(record.prompt + record.completion)
        if whole[: len(prompt)] != prompt:
            whole = prompt + self._encode_piece(record.completion)[0]
        return self._with_eos(whole, len(prompt))

    def _whole(self, text: str) -> Example:
        """The whole text is learned from; as everywhere, its first token does not count."""
        ids = self.encode_whole(text)
        if not ids:
            raise RenderError("the base's tokenizer makes no token of the text")
        return Example(tuple(ids), tuple(position > 0 for position in range(len(ids))))

    def _with_eos(self, ids: list[int], num_untrained: int) -> Example:
        trained = [position >= max(num_untrained, 1) for position in range(len(ids))]
        if self.eos_token_id is not None and ids[-1:] != [self.eos_token_id]:
            ids, trained = [*ids, self.eos_token_id], [*trained, True]
        if not any(trained):
            raise RenderError("nothing to train on: the text is a single token and the base has no end-of-text token")
        return Example(tuple(ids), tuple(trained))

    def fingerprint(self, dtype: str, adapter: str) -> Fingerprint:
        """What serving must share with training; `adapter` is "none" or a hash of the adapter's configuration."""
        template = self._template
        sources = None if template is None else [template.source, template.tool_source]
        special = {"named": self.special_tokens, "stop_token_ids": list(self.stop_token_ids)}
        return Fingerprint(
            chat_template=_sha256(canonical_json(sources)),
            tokenizer=self._tokenizer_hash,
            special_tokens=_sha256(canonical_json(special)),
            dtype=dtype,
            adapter=adapter,
        )

    def ends_with_stop(self, example: Example) -> bool:
        """Whether a stop token is among the trained ones, so that the model learns to stop."""
        return any(id in self.stop_token_ids for id, on in zip(example.token_ids, example.trained, strict=True) if on)

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise RenderError("this base has no chat template: it takes prompt/completion and text, not messages")
        return self._template

    # -- encoding with control tokens of the user kept as text ---------------------------------------------------------

    def _encode_marked(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and the character where each token starts. Marked control tokens are encoded as plain text; the steps
        are those of transformers' `encode_marked_chat`, so that the ids are the same."""
        first = _MARKED.search(text)
        head = self._plain.encode(text if first is None else text[: first.start()], add_special_tokens=False)
        ids, starts = head.ids, [start for start, _ in head.offsets]
        while first is not None:
            if token := first.group(1):
                literal = self._encode_literal(token)
                ids, starts = ids + literal, starts + [first.start()] * len(literal)
            following = _MARKED.search(text, first.end())
            piece = text[first.end() : following.start() if following else len(text)]
            if piece:
                piece_ids, piece_starts = self._encode_piece(piece)
                ids, starts = ids + piece_ids, starts + [first.end() + start for start in piece_starts]
            first = following
        return ids, starts

    def _encode_piece(self, piece: str) -> tuple[list[int], list[int]]:
        """Encode behind a newline that is taken away again, so that no space is put in front, as at a text's start."""
        newline = self._plain.encode("\n", add_special_tokens=False).ids
        encoding = self._plain.encode("\n" + piece, add_special_tokens=False)
        if encoding.ids[: len(newline)] == newline:
            return encoding.ids[len(newline) :], [start - 1 for start, _ in encoding.offsets[len(newline) :]]
        encoding = self._plain.encode(piece, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def _encode_literal(self, token: str) -> list[int]:
        """A control token's text as ordinary text."""
        newline, ids = self._without_added_tokens("\n"), self._without_added_tokens("\n" + token)
        plain_newline = self._plain.encode("\n", add_special_tokens=False).ids
        if ids[: len(plain_newline)] == plain_newline:
            ids = ids[len(newline) :] if newline == plain_newline else ids[len(plain_newline) :]
        else:
            ids = self._without_added_tokens(token)
        if self.tokenizer.token_to_id(token) in ids:
            raise RenderError(
                f"the text {token!r} stands for a control token of this base and cannot be written as text"
            )
        return ids

    def _without_added_tokens(self, text: str) -> list[int]:
        if self._plain.normalizer is not None:
            text = self._plain.normalizer.normalize_str(text)
        pieces = [text]
        if self._plain.pre_tokenizer is not None:
            pieces = [piece for piece, _ in self._plain.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in self._plain.model.tokenize(piece)]


def _num_appended(encoding: Encoding) -> int:
    """Special tokens that the post-processor put behind the text: they have no place in it."""
    count = 0
    for is_special, offsets in zip(reversed(encoding.special_tokens_mask), reversed(encoding.offsets), strict=True):
        if not is_special or offsets != (0, 0) or count == len(encoding.ids) - 1:
            break
        count += 1
    return count


def _unique(ids: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(id for id in ids if id is not None))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
