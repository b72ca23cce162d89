"""LoRA: what it changes, what it leaves, and that others read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from training.failure import Failure
from training.lora import LoraLinear, inject, load_adapter, lora_tensors, save_adapter
from training.spec import LoraSpec

CONFIGS = {
    "llama": {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gpt_neo": {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    },
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
SPEC = LoraSpec(rank=4, alpha=16.0)
VARIANTS = {
    "lora": SPEC,
    "rslora": LoraSpec(rank=4, alpha=8.0, rslora=True),
    "dora": LoraSpec(rank=4, alpha=16.0, dora=True),
    "rslora-dora": LoraSpec(rank=4, alpha=8.0, rslora=True, dora=True),
}
variants = pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)
IDS = torch.arange(20)[None] + 7


def base_model(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **CONFIGS[model_type])).eval()
    for name, param in model.named_parameters():
        if name.endswith("bias"):  # they start as zeros, and an adapter must leave them as they are
            param.data.normal_(std=0.1)
    return model


def trained_model(model_type: str, spec: LoraSpec = SPEC) -> PreTrainedModel:
    model = base_model(model_type)
    inject(model, spec, seed=1)
    torch.manual_seed(2)
    for name, tensor in lora_tensors(model).items():
        if "lora_B" in name:
            tensor.data.normal_(std=0.1)
        elif "magnitude" in name:
            tensor.data.mul_(1 + 0.3 * torch.randn(tensor.shape))
    return model


@variants
@pytest.mark.parametrize("model_type", CONFIGS)
def test_peft_loads_the_export_and_gives_the_same_logits(tmp_path: Path, model_type: str, spec: LoraSpec) -> None:
    model = trained_model(model_type, spec)
    save_adapter(model, spec, "some-base", tmp_path)
    theirs = PeftModel.from_pretrained(base_model(model_type), tmp_path).eval()
    with torch.no_grad():
        ours_logits, base_logits = model(IDS).logits, base_model(model_type)(IDS).logits
        torch.testing.assert_close(theirs(IDS).logits, ours_logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours_logits, base_logits, atol=1e-3)


@variants
def test_a_fresh_adapter_changes_nothing_and_every_linear_but_the_head_is_adapted(spec: LoraSpec) -> None:
    model = base_model("llama")
    with torch.no_grad():
        before = model(IDS).logits
        names = inject(model, spec, seed=1)
        torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)
    assert len(names) == 2 * 7
    assert not isinstance(model.get_output_embeddings(), LoraLinear)


@variants
def test_only_the_adapter_gets_gradients(spec: LoraSpec) -> None:
    model = trained_model("llama", spec)
    model(IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, param in model.named_parameters() if param.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_the_same_seed_gives_the_same_adapter_whatever_was_drawn_before() -> None:
    first, second = base_model("llama"), base_model("llama")
    inject(first, SPEC, seed=1)
    torch.rand(3)
    inject(second, SPEC, seed=1)
    for one, other in zip(lora_tensors(first).values(), lora_tensors(second).values(), strict=True):
        assert torch.equal(one, other)


def test_chosen_targets_survive_export_and_import(tmp_path: Path) -> None:
    spec = LoraSpec(rank=4, alpha=16.0, targets=("q_proj", "v_proj"))
    model = trained_model("llama", spec)
    save_adapter(model, spec, "some-base", tmp_path)
    other = base_model("llama")
    assert {name.rpartition(".")[2] for name in inject(other, spec, seed=9)} == {"q_proj", "v_proj"}
    load_adapter(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_an_adapter_of_another_shape_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    save_adapter(trained_model("llama"), SPEC, "some-base", tmp_path)
    for spec in (LoraSpec(rank=8, alpha=16.0), LoraSpec(rank=4, alpha=16.0, dora=True)):
        other = trained_model("llama", spec)
        before = {name: tensor.clone() for name, tensor in lora_tensors(other).items()}
        with pytest.raises(Failure, match="does not fit"):
            load_adapter(other, tmp_path)
        assert all(tensor.equal(before[name]) for name, tensor in lora_tensors(other).items())


@variants
def test_gradients_are_those_of_peft(tmp_path: Path, spec: LoraSpec) -> None:
    """In DoRA the length of a row is a constant to them."""
    ours = trained_model("llama", spec)
    save_adapter(ours, spec, "some-base", tmp_path)
    theirs = PeftModel.from_pretrained(base_model("llama"), tmp_path, is_trainable=True).eval()
    ours(IDS, labels=IDS).loss.backward()
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    expected = {
        name.replace(".default", "").replace("vector.weight", "vector"): param.grad
        for name, param in theirs.named_parameters()
        if param.requires_grad
    }
    found = {name: tensor.grad for name, tensor in lora_tensors(ours).items()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_the_layer_computes_what_merged_weights_would() -> None:
    layer = next(m for m in trained_model("llama").modules() if isinstance(m, LoraLinear))
    x = torch.randn(3, layer.lora_A.shape[1])
    merged = layer.base.weight + layer.scale * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ merged.T, rtol=1e-5, atol=1e-5)
