"""Text is whole characters, right spaces, and ends before stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from service.engine.detokenizer import ChoiceText, IncrementalDecoder, StopMatcher
from service.engine.token_text import TokenPieces
from tests.engine.models import REAL, byte_tokenizer
from tests.engine.running import ask

BYTES = byte_tokenizer()
EMOJI = "naïve 👩‍🚀 日本 🙂!"


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, prompt or [])
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


def test_characters_of_several_tokens_arrive_whole() -> None:
    ids = BYTES.encode(EMOJI).ids
    got = pieces(BYTES, ids)
    assert "".join(got) == EMOJI
    assert not any("\ufffd" in piece for piece in got)


def test_an_unfinished_character_at_the_end_is_shown_as_such() -> None:
    ids = BYTES.encode("a🙂").ids[:-1]
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids) == "a\ufffd"


@given(st.lists(st.integers(0, 258), max_size=80))
@settings(deadline=None, max_examples=60)
def test_any_tokens_give_the_text_of_a_whole_decode(ids: list[int]) -> None:
    whole = BYTES.decode(ids)
    got = "".join(pieces(BYTES, ids))
    if "\ufffd" * 9 not in whole:  # beyond a window of broken bytes only the end of each is approximate
        assert got == whole


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared models are not here")
@pytest.mark.parametrize("name", ["stories260K", "cardputer-chat"])
def test_spaces_are_right_for_sentencepiece_and_byte_level_tokenizers(name: str) -> None:
    tokenizer = Tokenizer.from_file(str(REAL / name / "tokenizer.json"))
    text = "Once upon a time, there was a girl. 🙂  She sang."
    ids = tokenizer.encode(text).ids
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == text
    for cut in range(1, len(ids)):
        start = tokenizer.decode(ids[:cut])
        if not start.endswith("\ufffd"):
            assert start + "".join(pieces(tokenizer, ids[cut:], ids[:cut])) == text


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
@settings(deadline=None)
def test_stop_strings_cut_alike_however_the_text_is_split(text: str, stops: list[str], data: st.DataObject) -> None:
    def run(chunks: list[str]) -> tuple[str, bool]:
        matcher, sent = StopMatcher(tuple(stops)), ""
        for chunk in chunks:
            fresh, stopped = matcher.push(chunk)
            sent += fresh
            if stopped:
                return sent, True
        return sent + matcher.flush(), False

    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    sent, stopped = run(chunks)
    assert (sent, stopped) == run([text])
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(sent)


def test_what_may_become_a_stop_string_is_held_back_until_it_is_certain() -> None:
    matcher = StopMatcher(("<end>",))
    assert [matcher.push(piece) for piece in ("a<", "en", "x<e", "nd>b")] == [
        ("a", False), ("", False), ("<enx", False), ("", True),
    ]  # fmt: skip


def test_a_stop_token_ends_the_text_and_counts() -> None:
    end = BYTES.token_to_id("<|end|>")
    text = ChoiceText(TokenPieces(BYTES), ask((1,), 9), 0, stop_token_ids=frozenset({end}), max_context=50)
    deltas = [text.push(token) for token in [*BYTES.encode("ok").ids, end]]
    assert [(delta.text, delta.num_tokens, delta.finish_reason) for delta in deltas if delta] == [
        ("o", 1, None), ("k", 1, None), ("", 1, "stop"),
    ]  # fmt: skip
