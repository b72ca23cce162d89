"""Order of examples, shares of workers, and packing that changes neither loss nor gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from training.attention import PACKED, PACKED_MODEL_TYPES
from training.batches import Batches, collate
from training.methods import supervised
from training.model import load_model
from training.spec import BaseRef, TrainSpec

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_NEO: dict[str, Any] = {
    "model_type": "gpt_neo",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_position_embeddings": 32,  # less than a packed row: packing by position ids would break
    "attention_types": [[["global", "local"], 1]],
    "window_size": 5,
    "resid_dropout": 0.0,
    "embed_dropout": 0.0,
    "attention_dropout": 0.0,
}


class Rows:
    """Examples in memory, indexed as a data set is."""

    def __init__(self, input_ids: list[list[int]], trained: list[list[bool]]) -> None:
        self.columns = {"input_ids": input_ids, "trained": trained, "lengths": [[len(ids)] for ids in input_ids]}

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, indices: list[int]) -> dict[str, list[Any]]:
        return {name: [column[i] for i in indices] for name, column in self.columns.items()}


def random_rows(lengths: list[int], seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 61, (n,), generator=generator).tolist() for n in lengths]
    trained = [(torch.rand(n, generator=generator) < 0.6).tolist() for n in lengths]
    return Rows(ids, trained)


def tiny_model(folder: Path, config: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    for param in model.parameters():
        param.data.add_(torch.randn_like(param) * 0.05)  # far from the symmetric start
    model.save_pretrained(folder)
    return load_model(folder, torch.float32, torch.device("cpu"))


def supervised_loss(model: PreTrainedModel, rows: Rows, part: list[int]) -> torch.Tensor:
    spec = TrainSpec(base=BaseRef(id="", key="", content_hash=""), training_key="")
    return supervised.loss_sums(spec, model, collate(rows[part])).loss


def loss_and_gradients(model: PreTrainedModel, rows: Rows, parts: list[list[int]]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    total = 0.0
    for part in parts:
        loss = supervised_loss(model, rows, part)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_packing(model: PreTrainedModel) -> None:
    rows = random_rows([7, 19, 1, 12, 7, 2, 23, 12])
    packed_loss, packed = loss_and_gradients(model, rows, [list(range(len(rows)))])
    single_loss, single = loss_and_gradients(model, rows, [[i] for i in range(len(rows))])
    assert packed_loss == pytest.approx(single_loss, rel=1e-5)
    torch.testing.assert_close(packed, single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(PACKED_MODEL_TYPES))
def test_packed_examples_give_the_loss_and_gradients_of_single_ones(tmp_path: Path, model_type: str) -> None:
    config = {**TINY, "model_type": model_type, "sliding_window": 6, "use_sliding_window": True}
    if model_type in ("llama", "gemma", "smollm3", "granite", "olmo2"):
        del config["sliding_window"], config["use_sliding_window"]
    if model_type in ("qwen2", "qwen3", "gemma3_text"):
        config["layer_types"] = ["sliding_attention", "full_attention"]
    model = tiny_model(tmp_path, config)
    assert model.config._attn_implementation == PACKED
    check_packing(model)


def test_a_model_outside_the_attention_interface_is_padded_and_gives_the_same(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, GPT_NEO)
    assert model.config._attn_implementation != PACKED
    check_packing(model)


@pytest.mark.parametrize("config", [{**TINY, "model_type": "llama"}, GPT_NEO], ids=["llama", "gpt_neo"])
def test_our_loss_is_that_of_plain_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    model = tiny_model(tmp_path, config)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    rows = random_rows([9, 14])
    expected = 0.0
    for ids, trained in zip(rows.columns["input_ids"], rows.columns["trained"], strict=True):
        labels = torch.tensor([[token if on else -100 for token, on in zip(ids, trained, strict=True)]])
        num_trained = (labels[:, 1:] != -100).sum().item()
        expected += plain(torch.tensor([ids]), labels=labels).loss.item() * num_trained
    assert supervised_loss(model, rows, [0, 1]).item() == pytest.approx(expected, rel=1e-5)


def test_an_epoch_holds_every_example_once_and_epochs_differ() -> None:
    batches = Batches(random_rows([4] * 10), batch_size=4, n_epochs=2, seed=3)
    assert (batches.steps_per_epoch, batches.total_steps) == (3, 6)
    epochs = [[i for step in steps for i in batches.indices(step)] for steps in ((1, 2, 3), (4, 5, 6))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert batches.indices(2) == epochs[0][4:8], "any step can be asked for again"


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_fewer_workers_than_shares_take_the_same_micro_batches(num_micro_batches: int) -> None:
    """So that a run with a range of workers needs the same memory, and has the same losses, with any of them."""
    rows = random_rows([4] * 19)

    def seen(num_workers: int, num_shares: int) -> list[list[tuple[int, ...]]]:
        choices: dict[str, Any] = {"num_micro_batches": num_micro_batches, "num_workers": num_workers}
        ranks = [
            Batches(rows, batch_size=8, n_epochs=1, seed=0, rank=rank, num_shares=num_shares, **choices)
            for rank in range(num_workers)
        ]
        most = max(len(rank.micro_batches(1)) for rank in ranks)
        assert most == -(-4 * num_micro_batches // num_workers), "they are dealt out evenly"
        steps = range(1, ranks[0].total_steps + 1)
        return [
            sorted(tuple(m.input_ids.tolist()) for rank in ranks for m in rank.micro_batches(step)) for step in steps
        ]

    of_four = seen(4, num_shares=1)
    for num_workers in (1, 2, 3):
        assert seen(num_workers, num_shares=4) == of_four


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_workers_and_micro_batches_share_a_step_without_loss_or_repetition(
    num_workers: int, num_micro_batches: int
) -> None:
    rows = Rows([[i] * (i + 2) for i in range(10)], [[True] * (i + 2) for i in range(10)])
    ranks = [
        Batches(
            rows,
            batch_size=4,
            n_epochs=1,
            seed=0,
            num_micro_batches=num_micro_batches,
            rank=rank,
            num_workers=num_workers,
        )
        for rank in range(num_workers)
    ]
    for step in range(1, 4):
        seen = [set(micro.input_ids.tolist()) for rank in ranks for micro in rank.micro_batches(step)]
        assert sorted(i for examples in seen for i in examples) == sorted(ranks[0].indices(step))
