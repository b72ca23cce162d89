"""The whole story on real Ray with the unmodified client: file, job, model, chat."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from openai import AsyncOpenAI, NotFoundError, OpenAI
from openai.types.fine_tuning import FineTuningJob

from tests.cluster.conftest import await_job, upload
from tests.cluster.rows import chat_rows, text_rows

QUESTION: Any = [{"role": "user", "content": "Name a colour."}]


def ask(client: OpenAI, model: str, **options: Any) -> str:
    """The greedy answer to one question."""
    options = {"temperature": 0, "max_tokens": 12} | options
    answer = client.chat.completions.create(model=model, messages=QUESTION, **options)
    return answer.choices[0].message.content or ""


@pytest.fixture(scope="module")
def lora_job(client: OpenAI) -> FineTuningJob:
    """A finished LoRA job on the real chat model."""
    job = client.fine_tuning.jobs.create(
        model="bot",
        training_file=upload(client, chat_rows(40)),
        suffix="colours",
        seed=7,
        metadata={"team": "red"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8, "learning_rate": 0.001}},  # type: ignore[typeddict-unknown-key]
        },
        extra_body={"validation_split": 0.2, "checkpoint_interval": 4, "adapter": {"type": "lora", "rank": 4}},
    )
    assert job.status in ("validating_files", "queued")
    return await_job(client, job.id)


def test_a_lora_job_succeeds_and_its_echo_is_resolved(lora_job: FineTuningJob) -> None:
    assert lora_job.status == "succeeded", lora_job.error
    assert lora_job.fine_tuned_model and lora_job.fine_tuned_model.startswith("ft:bot:local:colours:")
    assert lora_job.hyperparameters.n_epochs == 3
    assert lora_job.trained_tokens and lora_job.trained_tokens > 0
    assert lora_job.finished_at and lora_job.seed == 7


def test_the_tuned_model_answers_differently_from_its_base(client: OpenAI, lora_job: FineTuningJob) -> None:
    model = lora_job.fine_tuned_model or ""
    assert ask(client, model) != ask(client, "bot")
    assert client.models.retrieve(model).id == model
    assert model in {listed.id for listed in client.models.list()}


def test_a_streamed_answer_equals_the_whole_one(client: OpenAI, lora_job: FineTuningJob) -> None:
    model = lora_job.fine_tuned_model or ""
    stream = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(client, model)
    assert chunks[-1].usage and 0 < chunks[-1].usage.completion_tokens <= 12


async def test_the_async_client_gets_the_same_answer(service: Any, client: OpenAI, lora_job: FineTuningJob) -> None:
    model = lora_job.fine_tuned_model or ""
    async with AsyncOpenAI(base_url=service.url, api_key=service.admin_key) as other:
        answer = await other.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=12)
        jobs = [job.id async for job in other.fine_tuning.jobs.list(limit=1)]
    assert answer.choices[0].message.content == ask(client, model)
    assert lora_job.id in jobs


def test_events_checkpoints_and_results_tell_the_run(client: OpenAI, lora_job: FineTuningJob) -> None:
    events = list(client.fine_tuning.jobs.list_events(lora_job.id, limit=5))  # pages by itself
    steps = [event.data["step"] for event in events if event.type == "metrics" and "train_loss" in (event.data or {})]
    assert sorted(set(steps)) == list(range(1, 13)), steps  # 32 rows, 4 steps an epoch, 3 epochs
    assert events[0].created_at >= events[-1].created_at
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(lora_job.id))
    assert {checkpoint.step_number for checkpoint in checkpoints} >= {12, 8, 4}  # and the best
    assert ask(client, checkpoints[-1].fine_tuned_model_checkpoint)
    content = client.files.content(lora_job.result_files[0]).text
    rows = list(csv.DictReader(io.StringIO(content)))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert any(row["valid_loss"] for row in rows)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_an_alias_moves_to_the_tuned_model_for_the_next_request(client: OpenAI, lora_job: FineTuningJob) -> None:
    model = lora_job.fine_tuned_model or ""
    for target in ("bot", model):
        client.put("/aliases/helper", body={"model": target}, cast_to=object)
        answer = client.chat.completions.create(model="helper", messages=QUESTION, max_tokens=1)
        assert answer.model == target


def test_full_fine_tuning_gets_a_deployment_of_its_own(client: OpenAI) -> None:
    job = client.fine_tuning.jobs.create(
        model="stories",
        training_file=upload(client, text_rows(24)),
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}},
        extra_body={"adapter": {"type": "none"}},
    )
    job = await_job(client, job.id)
    assert job.status == "succeeded", job.error
    model = job.fine_tuned_model or ""
    answer = client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, temperature=0)
    assert answer.choices[0].text.strip()
    client.models.delete(model)
    with pytest.raises(NotFoundError):
        client.completions.create(model=model, prompt="Once", max_tokens=1)
