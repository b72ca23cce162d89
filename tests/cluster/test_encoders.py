"""Encoders on real Ray with the unmodified client: embed, train a classifier and an embedding model, call both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import NotFoundError, OpenAI

from tests.cluster.conftest import add_base, await_job, upload
from tests.engine.encoders import WIDTH, save_encoder

TEXTS = {"billing": "my card was charged twice", "technical": "the app crashes", "praise": "thanks, i love it"}


@pytest.fixture(scope="module")
def encoder(client: OpenAI, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny encoder, registered as any base."""
    folder: Path = save_encoder(tmp_path_factory.mktemp("encoder"), pooling="mean_tokens")
    add_base(client, "encoder", str(folder))
    return "encoder"


def test_a_base_encoder_embeds_and_does_not_chat(client: OpenAI, encoder: str) -> None:
    answer = client.embeddings.create(model=encoder, input=list(TEXTS.values()))
    rows = np.array([item.embedding for item in answer.data])
    assert rows.shape == (3, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    with pytest.raises(NotFoundError, match="v1/embeddings"):
        client.chat.completions.create(model=encoder, messages=[{"role": "user", "content": "Hi"}])


def test_a_classifier_is_trained_and_decides(client: OpenAI, encoder: str) -> None:
    rows = [{"text": f"{text} {i}", "label": label} for i in range(12) for label, text in TEXTS.items()]
    hyper: Any = {"n_epochs": 12, "batch_size": 12, "learning_rate": 0.02}
    job = client.fine_tuning.jobs.create(
        model=encoder,
        training_file=upload(client, rows),
        method={"type": "classification", "classification": {"hyperparameters": hyper}},  # type: ignore[typeddict-item]
        seed=0,
        extra_body={"adapter": {"type": "lora"}},
    )
    job = await_job(client, job.id)
    assert job.status == "succeeded", job.error
    choices: Any = [{"value": label} for label in TEXTS]
    for label, text in TEXTS.items():
        question: Any = {"type": "choice", "instructions": "What is it about?", "choices": choices}
        decision = client.decisions.create(model=job.fine_tuned_model or "", input=text, questions=[question])
        assert decision.answers[0].choice == label  # type: ignore[union-attr]


def test_an_embedding_model_is_trained_and_embeds(client: OpenAI, encoder: str) -> None:
    rows = [{"anchor": f"{label} {i}", "positive": f"{text} {i}"} for i in range(8) for label, text in TEXTS.items()]
    job = client.fine_tuning.jobs.create(
        model=encoder,
        training_file=upload(client, rows),
        method={"type": "embedding", "embedding": {"hyperparameters": {"n_epochs": 4, "batch_size": 12}}},  # type: ignore[typeddict-item]
    )
    job = await_job(client, job.id)
    assert job.status == "succeeded", job.error
    found = client.embeddings.create(model=job.fine_tuned_model or "", input="my card")
    assert len(found.data[0].embedding) == WIDTH
    assert found.model == job.fine_tuned_model
