"""Sample generations: what serving would answer, at every evaluation, and no trace in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training.runs import BASE_KEY, GPT_NEO, LLAMA, Recorder, make_base, make_spec
from tests.training.test_resume import check_ten_are_five_and_five, figures
from training.attention import PACKED
from training.loop import run
from training.model import load_model
from training.plan import PlanError, plan
from training.progress import Sample
from training.render import Renderer
from training.samples import MAX_NEW_TOKENS, Samples
from training.spec import TrainSpec
from training.storage import Storage

PROMPTS = ("what is 4?", "hi", "a rather long question, longer than the others")
SLIDING: dict[str, Any] = {**LLAMA, "model_type": "mistral", "sliding_window": 16}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def alone(folder: Path, prompt: str) -> str:
    """The likeliest answer of transformers' own model, reading everything anew for every token."""
    model, renderer = AutoModelForCausalLM.from_pretrained(folder).eval(), Renderer.load(folder)
    ids = renderer.encode_prompt([{"role": "user", "content": prompt}])
    num_prompt, limit = len(ids), min(MAX_NEW_TOKENS, 128 - longest(renderer))
    while len(ids) < num_prompt + limit:
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in renderer.stop_token_ids:
            break
        ids.append(token)
    return renderer.tokenizer.decode(ids[num_prompt:])


def longest(renderer: Renderer) -> int:
    return max(len(renderer.encode_prompt([{"role": "user", "content": prompt}])) for prompt in PROMPTS)


@pytest.mark.parametrize("model", [LLAMA, SLIDING, GPT_NEO], ids=["packed", "packed-sliding", "padded"])
def test_prompts_of_different_lengths_get_the_answers_that_they_get_alone(
    storage: Storage, model: dict[str, Any]
) -> None:
    base = make_base(storage, model)
    folder = storage.local_folder(BASE_KEY)
    trained = load_model(folder, torch.float32, torch.device("cpu"))
    attention, state = trained.config._attn_implementation, torch.get_rng_state()
    spec = make_spec(storage, base, sample_prompts=PROMPTS)
    found = Samples.load(spec, storage, folder).generate(trained)
    assert found == [(prompt, alone(folder, prompt)) for prompt in PROMPTS]
    assert len({text for _, text in found}) == len(PROMPTS)
    assert (attention == PACKED) == (model is not GPT_NEO)
    assert trained.config._attn_implementation == attention
    assert trained.training
    assert torch.get_rng_state().equal(state)


def test_every_evaluation_samples_and_the_run_is_the_same_without(storage: Storage, tmp_path: Path) -> None:
    base = make_base(storage)
    plain = make_spec(storage, base, dropout=0.3, validation_key="files/train", eval_interval=4)
    asked = TrainSpec.model_validate({**plain.model_dump(), "sample_prompts": PROMPTS})
    without, sampled = Recorder(), Recorder()
    run(plain, storage, "runs/plain", without, tmp_path)
    run(asked, storage, "runs/asked", sampled, tmp_path)
    assert figures(sampled) == figures(without)
    assert [(item.step, item.prompt) for item in sampled.of(Sample)] == [(s, p) for s in (4, 8, 12) for p in PROMPTS]


def test_resume_is_exact_with_samples(storage: Storage, tmp_path: Path) -> None:
    spec = make_spec(storage, make_base(storage), n_epochs=5, batch_size=6, sample_prompts=PROMPTS[:1])
    check_ten_are_five_and_five(storage, spec, tmp_path)


def test_a_run_learns_to_answer_its_prompt_and_needs_no_validation_set(storage: Storage, tmp_path: Path) -> None:
    channel = Recorder()
    spec = make_spec(storage, make_base(storage), lora=False, n_epochs=25, sample_prompts=PROMPTS[:1])
    assert run(spec, storage, "runs/one", channel, tmp_path).status == "finished"
    samples = [item.text for item in channel.of(Sample)]
    assert samples[-1].startswith("4 is even")
    assert not samples[0].startswith("4 is even")


def test_rows_that_are_no_conversations_are_continued_as_text(storage: Storage) -> None:
    base = make_base(storage)
    storage.write_bytes("files/text", b'{"text": "one two three four"}\n' * 12)
    spec = make_spec(storage, base, training_key="files/text", sample_prompts=("one two",))
    folder = storage.local_folder(BASE_KEY)
    assert Samples.load(spec, storage, folder).prompts == [Renderer.load(folder).encode_text("one two")]


def test_a_prompt_that_leaves_no_room_is_refused_by_planning(storage: Storage) -> None:
    spec = make_spec(storage, make_base(storage), sample_prompts=("hi", "x" * 200))
    with pytest.raises(PlanError, match=r"prompt 1 has \d+ tokens; it may have 1 to 127") as caught:
        plan(spec, storage)
    assert caught.value.param == "sample_prompts"
