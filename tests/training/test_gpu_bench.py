"""The benchmark of training on a GPU: it says so where there is none, and counts FLOPs as torch does."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tests.bench.__main__ import main
from tests.bench.gpu_training import flops
from tests.training.runs import LLAMA, make_base
from training.lora import inject, lora_tensors
from training.model_shape import ModelShape
from training.spec import LoraSpec
from training.storage import Storage

LENGTH, NUM_TRAINED = 96, 32


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_succeeds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tests.bench", "gpu-training"])
    main()
    text, figures = capsys.readouterr().out.splitlines()
    assert "no GPU" in text
    assert json.loads(figures) == {}


@pytest.mark.parametrize("lora", [False, True])
def test_flops_are_those_that_torch_counts(tmp_path: Path, lora: bool) -> None:
    storage = Storage(str(tmp_path))
    folder = Path(storage.path(make_base(storage, {**LLAMA, "num_hidden_layers": 8}).key))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")  # products that can be counted
    num_adapter = 0
    if lora:
        inject(model, LoraSpec(rank=4, alpha=8.0), seed=0)
        num_adapter = sum(tensor.numel() for tensor in lora_tensors(model).values())
    in_place = {torch.ops.aten.addmm_: _addmm_flops}  # torch counts it where it is not in place
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(input_ids=torch.arange(LENGTH)[None], logits_to_keep=NUM_TRAINED).logits.sum().backward()
    expected = flops(ModelShape(folder), num_adapter, [LENGTH], NUM_TRAINED)
    # Nothing flows back to a frozen embedding: the first layer saves a little of what the formula counts for LoRA.
    assert counter.get_total_flops() == (pytest.approx(expected, rel=0.03) if lora else expected)


def _addmm_flops(_: Sequence[int], first: Sequence[int], second: Sequence[int], **__: object) -> int:
    """Of the shapes of y, a and b in y + a b."""
    return 2 * first[0] * first[1] * second[1]
