"""Loss curves as the API shows them."""

from __future__ import annotations

from typing import Any

from openai import OpenAI

from tests.cluster.conftest import upload
from tests.cluster.rows import text_rows

NUM_STEPS = 30


def create_job(client: OpenAI, **extra: Any) -> str:
    """A seeded LoRA job of 30 small steps with a checkpoint every 5, the same each time; returns its id."""
    job = client.fine_tuning.jobs.create(
        model="stories",
        training_file=upload(client, text_rows(40)),
        seed=3,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 6, "batch_size": 8, "learning_rate": 0.005}},  # type: ignore[typeddict-unknown-key]
        },
        extra_body={"checkpoint_interval": 5, "adapter": {"type": "lora", "rank": 4, "dropout": 0.1}} | extra,
    )
    return job.id


def losses(client: OpenAI, job_id: str) -> dict[int, float]:
    """Training loss by step, from the result file."""
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "succeeded", job.error
    lines = client.files.content(job.result_files[0]).text.splitlines()
    names = lines[0].split(",")
    rows = (dict(zip(names, line.split(","), strict=True)) for line in lines[1:])
    return {int(row["step"]): float(row["train_loss"]) for row in rows}


def last_step(client: OpenAI, job_id: str) -> int:
    """The furthest step whose event has arrived; 0 before the first."""
    events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
    return max((event.data["step"] for event in events if event.type == "metrics" and event.data), default=0)
