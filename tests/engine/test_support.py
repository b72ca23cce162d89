"""What is told before training about being served is what the engine would find when it loads the model."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING, DynamicCache

from service.engine.support import STATEFUL_MODEL_TYPES, why_no_adapter
from training.attention import PACKED_MODEL_TYPES

BATCHED = {"DynamicLayer", "DynamicSlidingWindowLayer"}


def allocated(model_type: str) -> set[str]:
    """Kinds of the cache's layers."""
    return {type(layer).__name__ for layer in DynamicCache(config=CONFIG_MAPPING[model_type]()).layers}


@pytest.mark.parametrize("model_type", sorted(PACKED_MODEL_TYPES | {"gpt2", "gpt_neo", "qwen3_moe", "mixtral"}))
def test_adapters_are_served_on_models_of_keys_and_values(model_type: str) -> None:
    assert allocated(model_type) <= BATCHED
    assert why_no_adapter({"model_type": model_type}) is None


def test_models_with_another_state_are_not() -> None:
    for model_type in STATEFUL_MODEL_TYPES - {"deepseek_v4"}:  # whose default configuration has no cache at all
        assert not allocated(model_type) <= BATCHED, model_type
    assert "mamba" in (why_no_adapter({"model_type": "mamba"}) or "")
