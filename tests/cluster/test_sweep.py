"""A sweep on real Ray whose drivers are killed in the middle: it goes on, repeats nothing, and its model answers."""

from __future__ import annotations

from typing import Any

from openai import OpenAI

from tests.cluster.conftest import await_job, await_value, upload
from tests.cluster.processes import kill
from tests.cluster.rows import text_rows

RATES = [0.005, 1e-7, 1e-6]  # the first learns, the others do not


def trials_of(client: OpenAI, sweep_id: str) -> list[dict[str, Any]]:
    sweep = (client.fine_tuning.jobs.retrieve(sweep_id).model_extra or {})["sweep"]
    return list(sweep["trials"])


def test_a_sweep_survives_its_drivers_and_publishes_the_best_trial(client: OpenAI) -> None:
    job = client.fine_tuning.jobs.create(
        model="stories",
        training_file=upload(client, text_rows(40)),
        suffix="swept",
        seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}},
        extra_body={
            "validation_split": 0.2,
            "eval_interval": 1,
            "checkpoint_interval": 2,
            "sweep": {"parameters": {"learning_rate": RATES}, "scheduler": "asha", "max_concurrent": 1},
        },
    )
    await_value(lambda: trials_of(client, job.id)[1:2] and trials_of(client, job.id)[1]["job_id"], "a second trial")
    assert kill("ray::RunDriver") >= 1
    job = await_job(client, job.id)
    assert job.status == "succeeded", job.error
    trials = trials_of(client, job.id)
    assert trials[0]["status"] == "succeeded"
    assert all(trial["valid_loss"] > trials[0]["valid_loss"] for trial in trials[1:])
    assert (job.method.to_dict()["supervised"]["hyperparameters"]["learning_rate"]) == RATES[0]  # type: ignore[union-attr, index]
    texts = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert any("continuing with the trials left" in text for text in texts)
    assert len([text for text in texts if text.startswith("Trial 1 of 3 finished")]) == 1
    first = [event.message for event in client.fine_tuning.jobs.list_events(trials[0]["job_id"], limit=100)]
    assert first.count("Fine-tuning job started") == 1
    assert not [text for text in first if text.startswith("The job continues")]
    models = [model.id for model in client.models.list() if ":swept:" in model.id and ":ckpt-" not in model.id]
    assert models == [job.fine_tuned_model]
    answer = client.completions.create(model=models[0], prompt="Once upon a time", max_tokens=4, temperature=0)
    assert answer.choices[0].text
