"""An evaluation harness that scores a served model finds what it finds when it opens the same model by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from openai import OpenAI

from tests.cluster.rows import text_rows
from tests.shared import DATA, MODELS

MODEL = MODELS / "stories260K"  # fp32
NUM_ROWS = 24
WHERE = {"dataset_path": "json", "test_split": "test"}


def choices(folder: Path) -> dict[str, Any]:
    """Which of two words a message is: likelihoods of answers behind a question."""
    lines = (DATA / "sms-spam" / "SMSSpamCollection").read_text().splitlines()
    rows = [line.split("\t", 1) for line in lines if len(line) < 160][:NUM_ROWS]
    path = folder / "choices.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for label, text in rows))
    return {
        **WHERE,
        "task": "choices",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}\nThis message is",
        "doc_to_choice": ["ham", "spam"],
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def stories(folder: Path) -> dict[str, Any]:
    """How likely whole texts are."""
    path = folder / "stories.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_rows(NUM_ROWS)))
    return {
        **WHERE,
        "task": "stories",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }


def evaluate(tasks: list[dict[str, Any]], backend: str, **arguments: Any) -> tuple[dict[str, Any], list[float]]:
    """Metrics by task, and every log-likelihood."""
    results = lm_eval.simple_evaluate(
        model=backend,
        model_args=arguments | {"max_length": 256, "add_bos_token": True},
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    assert results is not None
    likelihoods = [
        float(response[0]) if isinstance(response, list | tuple) else float(response)
        for name in sorted(results["samples"])
        for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        for response in sample["filtered_resps"]
    ]
    return results["results"], likelihoods


def test_lm_eval_through_local_completions_equals_its_own_backend(
    client: OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", client.api_key)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = [choices(tmp_path), stories(tmp_path)]
    served, their_likelihoods = evaluate(
        tasks,
        "local-completions",
        model="stories",
        base_url=f"{client.base_url}completions",
        tokenizer=str(MODEL),
        tokenizer_backend="huggingface",
        num_concurrent=4,
    )
    opened, likelihoods = evaluate(tasks, "hf", pretrained=str(MODEL), dtype="float32", device="cpu")
    assert len(likelihoods) == 3 * NUM_ROWS
    assert their_likelihoods == pytest.approx(likelihoods, rel=1e-3, abs=1e-3)
    for task, metrics in opened.items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert len(numbers) >= 2
        assert {name: served[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-3)
