"""Greedy text equals `model.generate`, token for token, whatever the batch; near-ties excepted."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from service.engine.native.engine import NativeEngine
from service.engine.native.stepper import Stepper
from service.engine.protocol import AdapterRef
from tests.engine.models import REAL, load_model
from tests.engine.running import AnyEngine, ask, running

NEAR_TIE = 1e-4


class Ids:
    """Decodes token ids as numbers, so that text shows exactly which tokens were chosen."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(f"{token_id} " for token_id in ids)


async def chosen(
    engine: AnyEngine, prompt: tuple[int, ...], max_tokens: int, adapter: AdapterRef | None = None
) -> list[int]:
    request = ask(prompt, max_tokens, adapter=adapter)
    text = "".join([delta.text async for deltas in engine.generate(request) for delta in deltas])
    return [int(word) for word in text.split()]


def assert_greedy(model: torch.nn.Module, prompt: tuple[int, ...], got: list[int]) -> None:
    """`got` is what `generate` says, or leaves it at a token whose logit is as good."""
    expected = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=len(got), do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    different = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), None)
    if different is not None:
        with torch.inference_mode():
            logits = model(torch.tensor([list(prompt) + expected[:different]])).logits[0, -1]
        gap = float(logits[expected[different]] - logits[got[different]])
        assert gap <= NEAR_TIE, f"token {different} of {got}, expected {expected}"


async def compare(folder: Path, vocab_size: int, batch_size: int, *, max_prompt: int, num: int) -> None:
    draw = random.Random(batch_size)
    sizes = [(draw.randint(1, max_prompt), draw.randint(1, 30)) for _ in range(num)]
    requests = [(tuple(draw.randrange(vocab_size) for _ in range(length)), tokens) for length, tokens in sizes]
    engine = NativeEngine(folder, tokenizer=Ids(), dtype="fp32", max_batch_size=batch_size)  # type: ignore[arg-type]
    async with running(engine):
        answers = await asyncio.gather(*(chosen(engine, prompt, tokens) for prompt, tokens in requests))
    model = load_model(folder)
    for (prompt, tokens), got in zip(requests, answers, strict=True):
        assert len(got) == tokens
        assert_greedy(model, prompt, got)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("kind", ["llama", "mistral-window", "gpt2", "gpt-neo-window", "mamba"])
async def test_greedy_text_equals_generate(kind: str, batch_size: int, model_folders: dict[str, Path]) -> None:
    """More requests than places and mixed lengths: sequences join and leave in the middle of the others."""
    await compare(model_folders[kind], 256, batch_size, max_prompt=60, num={1: 3, 7: 16, 32: 36}[batch_size])


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared models are not here")
@pytest.mark.parametrize(("name", "vocab_size"), [("stories260K", 512), ("cardputer-chat", 14019)])
async def test_greedy_text_of_real_models_equals_generate(name: str, vocab_size: int) -> None:
    await compare(REAL / name, vocab_size, 8, max_prompt=100, num=12)


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "gpt-neo-window"])
async def test_long_prompts_are_read_in_chunks(
    kind: str, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Stepper.__init__.__kwdefaults__, "prompt_tokens_per_step", 5)
    await compare(model_folders[kind], 256, 4, max_prompt=60, num=8)


async def test_a_full_context_slides_through_its_buffers(model_folders: dict[str, Path]) -> None:
    """Streams one after the other never let the batch run empty: columns are opened far beyond the first buffers."""
    engine = NativeEngine(model_folders["llama"], tokenizer=Ids(), dtype="fp32", max_batch_size=3)  # type: ignore[arg-type]
    model = load_model(model_folders["llama"])
    async with running(engine):

        async def one_after_another(start: int) -> None:
            for i in range(5):
                prompt = tuple(range(start, start + 5 + 20 * (i % 2)))
                assert_greedy(model, prompt, await chosen(engine, prompt, 103 - start))

        await asyncio.gather(*(one_after_another(start) for start in (1, 20)))
