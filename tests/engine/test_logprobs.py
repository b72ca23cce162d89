"""Log-probabilities are those of a plain forward pass, of chosen tokens and of prompts, and join with the text."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from service.engine.detokenizer import ChoiceText, echo_of
from service.engine.native.engine import NativeEngine
from service.engine.native.logprobs import PromptScores
from service.engine.native.stepper import Stepper
from service.engine.protocol import AdapterRef, Delta, TokenLogprob
from service.engine.token_text import Score, TokenPieces
from tests.engine.lora import merged, save_adapter
from tests.engine.models import REAL, byte_tokenizer, load_model
from tests.engine.running import Answer, ask, collect, running
from tests.engine.test_greedy import Ids

BYTES = byte_tokenizer()
TOLERANCE = 1e-4
PROMPT = tuple(range(30, 60))


def native(folder: Path, **options: object) -> NativeEngine:
    return NativeEngine(folder, **{"tokenizer": Ids(), "dtype": "fp32", **options})  # type: ignore[arg-type]


def assert_scored(
    model: torch.nn.Module, token_ids: tuple[int, ...], entries: list[TokenLogprob], first: int, k: int
) -> None:
    """The entries are of token_ids[first:], with the probabilities that one forward pass over all tokens gives."""
    assert [int(entry.token) for entry in entries] == list(token_ids[first:])
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)
    for at, entry in enumerate(entries, start=first):
        if at == 0:
            assert (entry.logprob, entry.top) == (None, ())
            continue
        row = expected[at - 1]
        assert entry.logprob == pytest.approx(float(row[token_ids[at]]), abs=TOLERANCE)
        assert [top.logprob for top in entry.top] == pytest.approx(row.topk(k).values.tolist(), abs=TOLERANCE)
        assert [float(row[int(top.token)]) for top in entry.top] == pytest.approx(
            [top.logprob for top in entry.top], abs=TOLERANCE
        )


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "gpt2", "gpt-neo-window"])
async def test_logprobs_equal_a_plain_forward_pass_whatever_the_sampling(
    kind: str, model_folders: dict[str, Path]
) -> None:
    """Of the model's own distribution: temperature, penalties and bias change what is drawn, not what is told."""
    model = load_model(model_folders[kind])
    sampling = [
        {"logprobs": 5},
        {"logprobs": 0, "temperature": 1.3, "seed": 1, "top_k": 7},
        {"logprobs": 20, "presence_penalty": 1.5, "logit_bias": ((11, 4.0), (12, -100.0))},
        {},
    ]
    async with running(native(model_folders[kind], max_batch_size=3)) as engine:
        answers = await asyncio.gather(*(collect(engine, ask(PROMPT[i:], 9 + i, **s)) for i, s in enumerate(sampling)))
    for i, (options, (answer,)) in enumerate(zip(sampling, answers, strict=True)):
        if not options:
            assert answer.logprobs == []
            continue
        chosen = tuple(int(word) for word in answer.text.split())
        assert len(chosen) == 9 + i
        prompt = PROMPT[i:]
        assert_scored(model, prompt + chosen, answer.logprobs, len(prompt), int(options["logprobs"]))  # type: ignore[call-overload]


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
@pytest.mark.parametrize("kind", ["llama", "gpt-neo-window"])
async def test_an_echoed_prompt_is_scored_in_chunks_as_in_one_pass(
    kind: str, max_tokens: int, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Stepper.__init__.__kwdefaults__, "prefill_tokens_per_step", 7)
    monkeypatch.setattr("service.engine.native.logprobs._ROWS_AT_ONCE", 3)
    model = load_model(model_folders[kind])
    async with running(native(model_folders[kind])) as engine:
        stream = asyncio.create_task(collect(engine, ask(PROMPT[5:], 20)))
        answers = await collect(engine, ask(PROMPT, max_tokens, n=2, echo=True, logprobs=2))
        await stream
        (single,) = await collect(engine, ask(PROMPT[:1], max_tokens, echo=True, logprobs=2))
        assert engine.stats().num_running == 0
    for prompt, answer in [(PROMPT, answers[0]), (PROMPT, answers[1]), (PROMPT[:1], single)]:
        token_ids = tuple(int(word) for word in answer.text.split())
        assert token_ids[: len(prompt)] == prompt
        assert (answer.num_tokens, len(token_ids)) == (max_tokens, len(prompt) + max_tokens)
        assert answer.finish_reason == "length"
        assert_scored(model, token_ids, answer.logprobs, 0, 2)


async def test_an_adapter_scores_a_prompt_with_its_own_weights(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = model_folders["llama"]
    adapter = AdapterRef("a", save_adapter(load_model(folder), tmp_path / "a", seed=1))
    async with running(native(folder)) as engine:
        request = ask(PROMPT, 0, adapter=adapter, echo=True, logprobs=1)
        (of_adapter,), (of_base,) = await asyncio.gather(
            collect(engine, request), collect(engine, ask(PROMPT, 0, echo=True, logprobs=1))
        )
    assert_scored(merged(load_model(folder), adapter.folder), PROMPT, of_adapter.logprobs, 0, 1)
    assert_scored(load_model(folder), PROMPT, of_base.logprobs, 0, 1)


def test_prompt_scores_take_chunks_of_any_length() -> None:
    logits = torch.randn(9, 50)
    ids = tuple(torch.randint(50, (9,)).tolist())
    whole, parts = PromptScores(ids, 3), PromptScores(ids, 3)
    whole.add(logits)
    for chunk in logits.split([4, 1, 4]):
        parts.add(chunk.to(torch.float64))
    expected = logits.log_softmax(-1)[range(8), list(ids[1:])].tolist()
    for scores in (whole.to_list(), parts.to_list()):
        assert [score.logprob for score in scores] == pytest.approx(expected, abs=1e-6)
        assert all(len(score.top) == 3 for score in scores)


def choice(tokenizer: Tokenizer, ids: list[int], *, prompt: tuple[int, ...] = (1,), **options: object) -> Answer:
    """One choice made of these tokens; token i has the log-probability -i."""
    end = frozenset({tokenizer.token_to_id("<|end|>")} if tokenizer.token_to_id("<|end|>") else ())
    echo = bool(options.pop("echo", False))
    request, pieces = ask(prompt, len(ids), logprobs=1, echo=echo, **options), TokenPieces(tokenizer)
    text, answer = ChoiceText(pieces, request, 0, stop_token_ids=end, max_context=500), Answer()
    scores = [Score(0.0, ())] * (len(prompt) - 1)
    deltas: list[Delta | None] = [text.begin(echo_of(pieces, request, scores))]
    for number, token_id in enumerate(ids):
        if text.finish_reason is None:
            deltas.append(text.push(token_id, Score(-float(number), ((token_id, -float(number)),))))
    for delta in filter(None, deltas):
        assert all(entry.offset <= len(answer.text + delta.text) for entry in delta.logprobs)
        answer.add(delta)
    return answer


def joined(answer: Answer) -> str:
    return b"".join(entry.raw or b"" for entry in answer.logprobs).decode(errors="replace")


def test_parts_of_a_character_are_entries_with_their_own_bytes() -> None:
    answer = choice(BYTES, BYTES.encode("a🙂!").ids)
    assert answer.text == joined(answer) == "a🙂!"
    assert [entry.raw for entry in answer.logprobs] == [b"a", b"\xf0", b"\x9f", b"\x99", b"\x82", b"!"]
    assert [entry.offset for entry in answer.logprobs] == [0, 1, 1, 1, 1, 2]
    assert [entry.logprob for entry in answer.logprobs] == [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]
    assert all(entry.top[0][:2] == (entry.token, entry.raw) for entry in answer.logprobs)


def test_a_token_behind_a_character_that_never_came_whole_has_its_own_offset() -> None:
    answer = choice(BYTES, [*BYTES.encode("a🙂").ids[:2], *BYTES.encode("|b").ids])
    assert answer.text == joined(answer) == "a\ufffd|b"
    assert [entry.offset for entry in answer.logprobs] == [0, 1, 2, 3]


@pytest.mark.parametrize(("stop", "text"), [("def", "abc"), ("a", ""), ("zz", "abcdefgh"), ("gh", "abcdef")])
def test_entries_after_the_cut_of_a_stop_string_are_dropped(stop: str, text: str) -> None:
    answer = choice(BYTES, BYTES.encode("abcdefgh").ids, stop=(stop,))
    assert answer.text == joined(answer) == text
    assert len(answer.logprobs) == len(text)


def test_a_stop_token_is_the_last_entry_and_no_text() -> None:
    end = BYTES.token_to_id("<|end|>")
    answer = choice(BYTES, [*BYTES.encode("ok").ids, end])
    assert [(entry.token, entry.raw, entry.offset) for entry in answer.logprobs] == [
        ("o", b"o", 0), ("k", b"k", 1), ("<|end|>", None, 2),
    ]  # fmt: skip


def test_offsets_go_on_behind_an_echoed_prompt() -> None:
    answer = choice(BYTES, BYTES.encode("dé").ids, prompt=tuple(BYTES.encode("aé<|user|>c").ids), echo=True)
    assert answer.text == joined(answer) == "aécdé"
    assert [entry.offset for entry in answer.logprobs] == [0, 1, 1, 2, 2, 3, 4, 4]
    assert [entry.logprob for entry in answer.logprobs[:2]] == [None, 0.0]
    assert answer.num_tokens == 3


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared models are not here")
@pytest.mark.parametrize("name", ["stories260K", "cardputer-chat"])
@pytest.mark.parametrize("echo", [False, True])
def test_entries_join_with_the_text_for_sentencepiece_and_byte_level_tokenizers(name: str, echo: bool) -> None:
    tokenizer = Tokenizer.from_file(str(REAL / name / "tokenizer.json"))
    ids = tokenizer.encode("Once upon a time, there was a girl. 🙂  Ünï! She sang.").ids
    for cut in (1, 5, len(ids) - 9):
        answer = choice(tokenizer, ids[cut:], prompt=tuple(ids[:cut]), echo=echo)
        assert answer.text == joined(answer)
        offsets = [entry.offset for entry in answer.logprobs]
        for entry, start, stop in zip(answer.logprobs, offsets, [*offsets[1:], len(answer.text)], strict=True):
            if entry.raw is not None and "\ufffd" not in entry.token:
                assert answer.text[start:stop] == entry.token


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared models are not here")
@pytest.mark.parametrize("name", ["stories260K", "cardputer-chat"])
def test_every_token_of_a_real_vocabulary_has_bytes_or_is_special(name: str) -> None:
    tokenizer = Tokenizer.from_file(str(REAL / name / "tokenizer.json"))
    pieces = TokenPieces(tokenizer)
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    found = [pieces[token_id] for token_id in range(tokenizer.get_vocab_size())]
    assert {token_id for token_id, piece in enumerate(found) if piece.raw is None} == special
    assert {piece.raw for piece in found if piece.raw and len(piece.raw) == 1} >= {bytes([byte]) for byte in (65, 240)}
