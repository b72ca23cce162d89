"""The starter base: the same each time, loadable by everyone, with a chat template that says what is learnt."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from training.starter import build_starter
from training.starter.corpus import KINDS, documents
from training.starter.tokenizer import END, START, chat_text, encode

NUM_STEPS = 2
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi ✓ {{ 7 }}"},
    {"role": "assistant", "content": " two  spaces\nand a line "},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "Bye"},
]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A starter of two steps."""
    made = tmp_path_factory.mktemp("starter")
    build_starter(made, lambda line: None, num_steps=NUM_STEPS)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    """The starter's tokenizer as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_the_corpus_is_the_same_each_time_and_a_longer_one_is_not_another() -> None:
    first = list(documents(300, seed=1))
    assert first == list(documents(300, seed=1))
    assert first != list(documents(300, seed=2))
    assert len({json.dumps(document) for document in first}) > 250  # varied
    assert sum(KINDS.values()) == pytest.approx(1)


def test_the_corpus_has_texts_and_chats_that_end_with_the_assistant() -> None:
    kinds = Counter("text" if isinstance(document, str) else document[-1]["role"] for document in documents(500, 3))
    assert set(kinds) == {"text", "assistant"}


def test_building_twice_writes_the_same_bytes_and_leaves_the_process_as_it_was(folder: Path, tmp_path: Path) -> None:
    threads, state, lines = torch.get_num_threads(), torch.random.get_rng_state(), list[str]()
    again = tmp_path / "new" / "folder"
    build_starter(again, lines.append, num_steps=NUM_STEPS)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(lines) >= 3
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in names:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_transformers_loads_it_and_knows_where_an_answer_ends(folder: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 512
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END)
    assert all(weight.dtype == torch.float32 for weight in load_file(folder / "model.safetensors").values())
    assert sum(parameter.numel() for parameter in model.parameters()) < 5_000_000


@pytest.mark.parametrize("text", ["Grüße, 你好 🙂\r\n\t", "\x00\x7f", "007 3.14", f"{START}user"])
def test_any_text_survives_the_tokenizer(folder: Path, text: str) -> None:
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text


def test_the_template_writes_what_pre_training_saw(folder: Path, tokenizer: Any) -> None:
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chats = [document for document in documents(200, 5) if not isinstance(document, str)]
    for chat in [CHAT, *islice(chats, 50)]:
        assert tokenizer.apply_chat_template(chat, tokenize=False) == chat_text(chat)
        ids, speech = encode(made, chat)
        assert made.decode(ids, skip_special_tokens=False) == chat_text(chat)
        assert len(ids) == len(speech)


def test_what_the_assistant_says_and_its_end_are_learnt_and_nothing_else(tokenizer: Any) -> None:
    made = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [token for token, said in zip(made["input_ids"], made["assistant_masks"], strict=True) if said]
    assert tokenizer.decode(learnt) == f" two  spaces\nand a line {END}Bye{END}"


def test_the_generation_prompt_is_how_an_answer_begins(tokenizer: Any) -> None:
    asked = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(CHAT[:3], tokenize=False).startswith(asked)


def test_tools_calls_and_results_are_rendered(tokenizer: Any) -> None:
    chat = [
        CHAT[0],
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
        {"role": "assistant", "content": "It is noon."},
    ]
    shown = tokenizer.apply_chat_template(chat, tools=[TOOL], tokenize=False)
    assert shown.count("Be kind.") == 1
    assert '<tool_call>{"name": "now", "arguments": {"zone": "UTC"}}</tool_call>' + END in shown
    assert f"{START}tool\nnoon{END}" in shown


def test_an_unknown_role_is_refused_rather_than_dropped(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="knows no role"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "Once"}], tokenize=False)
