"""What every engine promises; all of them pass the same tests: echo, the native engine on its fast path and on the step
loop over transformers' own forward pass, and vLLM where it is installed (see `test_vllm`)."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from service.engine.echo import EchoEngine
from service.engine.native.engine import NativeEngine
from service.engine.protocol import AdapterMismatch, AdapterRef, QueueFull
from service.engine.vllm import VllmEngine
from tests.engine.lora import save_adapter
from tests.engine.models import byte_tokenizer, load_model
from tests.engine.running import AnyEngine, EngineFailed, ask, collect, running

TOKENIZER = byte_tokenizer()
PROMPT = tuple(TOKENIZER.encode("Hello there, how are you today my friend?").ids)


class Maker:
    """Builds engines of one kind."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder

    def __call__(self, **options: Any) -> AnyEngine:
        if self.kind == "echo":
            return EchoEngine(TOKENIZER, **{"max_context": 128, **options})
        if self.kind == "vllm":
            return VllmEngine(self.folder, tokenizer=TOKENIZER, **options)
        return NativeEngine(self.folder, tokenizer=TOKENIZER, **options)


NEEDS_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")


@pytest.fixture(params=["echo", "native", "transformers", pytest.param("vllm", marks=NEEDS_VLLM)])
def make(request: pytest.FixtureRequest, model_folders: dict[str, Path]) -> Maker:
    model = "gpt2" if request.param == "transformers" else "llama-wide"  # vLLM wants heads of 32 and more
    return Maker(request.param, model_folders[model])


@pytest.fixture
def adapters(make: Maker, tmp_path: Path) -> list[AdapterRef]:
    return [AdapterRef(f"a{i}", save_adapter(load_model(make.folder), tmp_path / f"a{i}", seed=i)) for i in range(3)]


async def test_a_request_ends_at_max_tokens(make: Maker) -> None:
    async with running(make()) as engine:
        (answer,) = await collect(engine, ask(PROMPT, 7))
        assert (answer.num_tokens, answer.finish_reason) == (7, "length")
        assert engine.stats().num_generated_tokens == 7


async def test_a_request_ends_at_the_context_limit(make: Maker) -> None:
    async with running(make(max_context=len(PROMPT) + 5)) as engine:
        (answer,) = await collect(engine, ask(PROMPT, 1000))
        assert (answer.num_tokens, answer.finish_reason) == (5, "length")
        with pytest.raises(ValueError, match="context"):
            await collect(engine, ask(PROMPT * 2, 1))


async def test_bad_requests_are_refused_and_the_engine_goes_on(make: Maker) -> None:
    async with running(make()) as engine:
        for bad in (ask((), 3), ask(PROMPT, 0), ask(PROMPT, 1, n=0), ask(PROMPT, 1, n=10_000)):
            with pytest.raises(ValueError, match=r"prompt|max_tokens|n"):
                await collect(engine, bad)
        assert len(await collect(engine, ask(PROMPT, 3))) == 1


async def test_a_stop_string_cuts_the_text_before_itself(make: Maker) -> None:
    async with running(make()) as engine:
        (whole,) = await collect(engine, ask(PROMPT, 30))
        stop = whole.text[10:13]
        (answer,) = await collect(engine, ask(PROMPT, 30, stop=(stop,)))
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert answer.finish_reason == "stop"
        assert answer.num_tokens < 30


async def test_logprobs_are_told_when_asked_and_join_with_the_text(make: Maker) -> None:
    async with running(make()) as engine:
        (plain,) = await collect(engine, ask(PROMPT, 30))
        assert plain.logprobs == []
        stop = plain.text[10:13]
        for sampling in ({"logprobs": 3}, {"logprobs": 0, "stop": (stop,)}):
            (answer,) = await collect(engine, ask(PROMPT, 30, **sampling))
            text = b"".join(entry.raw or b"" for entry in answer.logprobs).decode(errors="replace")
            assert text.startswith(answer.text)
            assert all(entry.offset <= len(answer.text) for entry in answer.logprobs)
            for entry in answer.logprobs:
                assert entry.logprob is not None
                assert entry.logprob <= 0
                assert len(entry.top) <= sampling["logprobs"]  # type: ignore[operator]
                assert all(top.logprob <= entry.top[0].logprob for top in entry.top)
        (whole,) = await collect(engine, ask(PROMPT, 30, logprobs=1))
        assert (whole.text, len(whole.logprobs)) == (plain.text, plain.num_tokens)


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_echo_sends_the_prompt_first_and_needs_no_new_token(make: Maker, logprobs: int | None) -> None:
    prompt_text = TOKENIZER.decode(PROMPT)
    options = {"max_resident_adapters": 0} if make.kind == "vllm" else {}  # which scores no prompts beside adapters
    async with running(make(max_context=len(PROMPT) + 4, **options)) as engine:
        (plain,) = await collect(engine, ask(PROMPT, 4))
        for max_tokens in (0, 4):
            answers = await collect(engine, ask(PROMPT, max_tokens, n=2, echo=True, logprobs=logprobs))
            for answer in answers:
                assert (answer.num_tokens, answer.finish_reason) == (max_tokens, "length")
                assert answer.text == prompt_text + (plain.text if max_tokens else "")
                assert len(answer.logprobs) == (len(PROMPT) + max_tokens if logprobs else 0)
                assert not answer.logprobs or answer.logprobs[0].logprob is None
        (full,) = await collect(engine, ask((*PROMPT, 1, 2, 3, 4), 0, echo=True))
        assert full.num_tokens == 0
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)


async def test_a_stop_string_is_looked_for_behind_an_echoed_prompt_only(make: Maker) -> None:
    async with running(make()) as engine:
        (answer,) = await collect(engine, ask(PROMPT, 3, echo=True, stop=("there",)))
        assert answer.text.startswith(TOKENIZER.decode(PROMPT))
        assert answer.num_tokens == 3


async def test_n_choices_end_each_with_its_own_reason(make: Maker) -> None:
    async with running(make(max_batch_size=4)) as engine:
        answers = await collect(engine, ask(PROMPT, 5, n=4))
        assert [answer.num_tokens for answer in answers] == [5, 5, 5, 5]
        assert len({answer.text for answer in answers}) == 1  # greedy


async def test_many_requests_run_together_and_answer_like_alone(make: Maker) -> None:
    prompts = [PROMPT[i:] for i in range(12)]
    async with running(make(max_batch_size=5)) as engine:
        alone = [await collect(engine, ask(prompt, 9)) for prompt in prompts]
        together = await asyncio.gather(*(collect(engine, ask(prompt, 9)) for prompt in prompts))
        assert together == alone


async def test_too_much_waiting_is_queue_full_before_the_first_delta(make: Maker) -> None:
    async with running(make(max_batch_size=1, max_waiting=2)) as engine:
        results = await asyncio.gather(*(collect(engine, ask(PROMPT, 20)) for _ in range(6)), return_exceptions=True)
        assert sum(isinstance(result, QueueFull) for result in results) == 3
        assert sum(isinstance(result, list) for result in results) == 3
        assert len(await collect(engine, ask(PROMPT, 2))) == 1


async def test_closing_the_iterator_frees_the_place(make: Maker) -> None:
    async with running(make(max_batch_size=1, max_waiting=0)) as engine:
        for _ in range(5):
            stream = engine.generate(ask(PROMPT, 80))
            await anext(stream)
            with pytest.raises(QueueFull):
                await collect(engine, ask(PROMPT, 1))
            await stream.aclose()  # type: ignore[attr-defined]
        (answer,) = await collect(engine, ask(PROMPT, 3))
        assert answer.num_tokens == 3
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)


async def test_a_cancelled_reader_frees_the_place(make: Maker) -> None:
    async with running(make(max_batch_size=1, max_waiting=1)) as engine:
        stream = engine.generate(ask(PROMPT, 80))
        await anext(stream)
        waiting = asyncio.create_task(collect(engine, ask(PROMPT, 3)))
        while engine.stats().num_waiting == 0:
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await stream.aclose()  # type: ignore[attr-defined]
        assert len(await collect(engine, ask(PROMPT, 3))) == 1


async def test_adapters_answer_for_themselves(make: Maker, adapters: list[AdapterRef]) -> None:
    async with running(make()) as engine:
        targets = [None, *adapters]
        answers = await asyncio.gather(*(collect(engine, ask(PROMPT, 12, adapter=adapter)) for adapter in targets))
        assert len({answer.text for (answer,) in answers}) == len(targets)
        assert set(engine.stats().resident_adapters) == {adapter.id for adapter in adapters}
        assert engine.stats().num_adapter_loads == 3


async def test_idle_adapters_make_room_least_recently_used_first(make: Maker, adapters: list[AdapterRef]) -> None:
    first, second, third = adapters
    async with running(make(max_resident_adapters=2)) as engine:
        for adapter in (first, second, first, third):
            await engine.load_adapter(adapter)
        assert engine.stats().resident_adapters == (first.id, third.id)


async def test_an_adapter_that_cannot_run_is_refused(make: Maker, tmp_path: Path) -> None:
    async with running(make()) as engine:
        missing = AdapterRef("missing", tmp_path / "missing")
        with pytest.raises(AdapterMismatch, match="missing"):
            await engine.load_adapter(missing)
        with pytest.raises(AdapterMismatch, match="missing"):
            await collect(engine, ask(PROMPT, 3, adapter=missing))
        assert len(await collect(engine, ask(PROMPT, 3))) == 1
        assert engine.stats().resident_adapters == ()


async def test_stop_ends_open_streams_and_refuses_new_ones(make: Maker) -> None:
    engine = make()
    await engine.start()
    assert engine.healthy
    stream = engine.generate(ask(PROMPT, 80))
    await anext(stream)
    await engine.stop()
    with pytest.raises(EngineFailed):
        async for _ in stream:
            pass
    assert not engine.healthy
    with pytest.raises(EngineFailed):
        await collect(engine, ask(PROMPT, 1))
