"""The try-out that tells a base's speed: what it makes of a base, and what it says where it cannot tell."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.training.runs import BASE_KEY, LLAMA, make_base, make_spec
from training.model_shape import ModelShape
from training.probe import ProbeError, _Steps, tokens_per_s, write_shallow
from training.progress import StepMetrics
from training.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_the_first_layers_of_a_base_are_a_base(storage: Storage, tmp_path: Path, depth: int) -> None:
    """qwen2 lists a type for each layer, which has to be cut with them."""
    make_base(storage, {**LLAMA, "model_type": "qwen2", "num_hidden_layers": 3})
    base = storage.local_folder(BASE_KEY)
    write_shallow(base, tmp_path / "shallow", depth)
    shape, whole = ModelShape(tmp_path / "shallow"), ModelShape(base)
    assert shape.num_layers == min(depth, 3)
    assert shape.num_layer_parameters * 3 == whole.num_layer_parameters * shape.num_layers
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shallow")
    stored = load_file(base / "model.safetensors")
    assert all(tensor.equal(stored[name]) for name, tensor in model.state_dict().items() if name in stored)


def test_a_try_out_that_fails_says_why(storage: Storage) -> None:
    spec = make_spec(storage, make_base(storage))
    (storage.local_folder(BASE_KEY) / "tokenizer.json").unlink()
    with pytest.raises(ProbeError, match=r"a try-out failed: .*tokenizer\.json"):
        tokens_per_s(spec, storage, 20.0, num_threads=1, patience_s=240)


def test_steps_without_a_token_are_no_division_by_zero() -> None:
    steps, numbers = _Steps(), {"train_loss": 0.0, "train_mean_token_accuracy": 0.0, "learning_rate": 0.1}
    fields = {"total_steps": 2, "epoch": 1.0, "grad_norm": 0.0, "num_trained_tokens": 0, "tokens_per_s": 0.0, **numbers}
    steps.send([StepMetrics(seq=step, at=0.0, step=step, **fields) for step in (1, 2)])
    with pytest.raises(SystemExit, match="no token to learn from"):
        steps.step_s(1)
