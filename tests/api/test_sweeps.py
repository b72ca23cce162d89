"""Sweeps over HTTP, as far as they go without a run: what is refused, what is shown, and wishes for all trials."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from service.jobs.states import JobKind, JobState
from service.jobs.sweeps import MAX_TRIALS
from service.platform import Platform
from service.store import jobs
from service.store.tables import Job
from tests.api.conftest import BASE, NewClient

RATES = [1e-4, 3e-4]


def create(client: OpenAI, training_file: str, sweep: Any, **extra: Any) -> FineTuningJob:
    """A sweep that validates on a fifth of its rows, unless `extra` says otherwise."""
    method = extra.pop("method", openai.omit)
    body = {"validation_split": 0.2, "sweep": sweep, **extra}
    return client.fine_tuning.jobs.create(model=BASE, training_file=training_file, method=method, extra_body=body)


def shown(job: FineTuningJob, name: str) -> Any:
    return (job.model_extra or {})[name]


def begin(platform: Platform, sweep_id: str, num_trials: int) -> list[Job]:
    """A running sweep with its first trials, as the orchestrator and the sweep's driver leave them."""
    combinations = [{"learning_rate": rate} for rate in RATES]
    with platform.db.write() as tx:
        sweep = jobs.by_id(tx, sweep_id)
        jobs.move(tx, sweep_id, JobState.QUEUED, plan={"trials": combinations})
        jobs.move(tx, sweep_id, JobState.RUNNING)
        return [
            jobs.create(
                tx,
                project_id=sweep.project_id,
                created_by=sweep.created_by,
                method=sweep.method,
                parent_job_id=sweep_id,
                trial_number=number,
                trial={"parameters": combinations[number - 1], "valid_loss": None, "step": None},
                priority=0,
                base_id=sweep.base_id,
                training_file_id=sweep.training_file_id,
                request={},
                request_hash="",
                spec=sweep.spec,
            )
            for number in range(1, num_trials + 1)
        ]


def test_a_sweep_is_a_job_that_echoes_what_it_searches(
    project_client: OpenAI, platform: Platform, training_file: str
) -> None:
    asked = {
        "search": "random",
        "scheduler": "asha",
        "num_trials": 8,
        "max_concurrent": 3,
        "parameters": {"learning_rate": {"min": 1e-5, "max": 1e-3, "log": True}, "lora_rank": [8, 16]},
        "metric": "valid_loss",
    }
    job = create(project_client, training_file, asked)
    assert (job.status, shown(job, "kind"), shown(job, "parent")) == ("validating_files", "sweep", None)
    echoed = shown(job, "sweep")
    echoed["parameters"] = {name: value for name, value in echoed["parameters"].items() if value is not None}
    assert {name: echoed[name] for name in asked} == asked
    assert (echoed["trials"], echoed["best_trial"]) == ([], None)
    with platform.db.read() as tx:
        assert jobs.by_id(tx, job.id).kind == JobKind.SWEEP


GRID = {"parameters": {"learning_rate": RATES}}
MANY = {"batch_size": list(range(1, 33)), "n_epochs": [1, 2, 3]}


@pytest.mark.parametrize(
    ("sweep", "extra", "param"),
    [
        (GRID, {"validation_split": 0}, "validation_file"),
        ({}, {}, "sweep.parameters"),
        ({"parameters": {}}, {}, "sweep.parameters"),
        ({"parameters": {"weight_decay": [0, 1]}}, {}, "sweep.parameters.weight_decay"),
        ({"parameters": {"learning_rate": []}}, {}, "sweep.parameters.learning_rate"),
        ({"parameters": {"learning_rate": 0.1}}, {}, "sweep.parameters.learning_rate"),
        ({"parameters": {"learning_rate": [1e-3, 1e-3]}}, {}, "sweep.parameters.learning_rate"),
        ({"parameters": {"learning_rate": [1e-3, -1]}}, {}, "sweep.parameters.learning_rate.1"),
        ({"parameters": {"batch_size": [4, 257]}}, {}, "sweep.parameters.batch_size.1"),
        ({"parameters": {"batch_size": ["4"]}}, {}, "sweep.parameters.batch_size.0"),
        ({"parameters": {"n_epochs": [1.5]}}, {}, "sweep.parameters.n_epochs.0"),
        ({"parameters": {"learning_rate": {"min": 1e-3, "max": 1e-4}}}, {}, "sweep.parameters.learning_rate"),
        ({"parameters": {"learning_rate": {"min": 1e-4}}}, {}, "sweep.parameters.learning_rate.max"),
        ({"parameters": {"learning_rate": {"min": 1e-4, "max": 1e-3}}}, {}, "sweep.parameters.learning_rate"),
        (GRID | {"search": "bayes"}, {}, "sweep.search"),
        (GRID | {"scheduler": "pbt"}, {}, "sweep.scheduler"),
        (GRID | {"metric": "train_loss"}, {}, "sweep.metric"),
        (GRID | {"seeds": 3}, {}, "sweep.seeds"),
        (GRID | {"num_trials": 2}, {}, "sweep.num_trials"),
        (GRID | {"max_concurrent": 0}, {}, "sweep.max_concurrent"),
        (GRID | {"search": "random"}, {}, "sweep.num_trials"),
        (GRID | {"search": "random", "num_trials": 3}, {}, "sweep.num_trials"),
        (GRID | {"search": "random", "num_trials": MAX_TRIALS + 1}, {}, "sweep.num_trials"),
        ({"parameters": MANY}, {}, "sweep.parameters"),
        ({"parameters": {"lora_rank": [4, 8]}}, {"adapter": {"type": "none"}}, "sweep.parameters.lora_rank"),
        ({"parameters": {"lora_rank": [4, 8]}}, {"adapter": {"rank": 4}}, "sweep.parameters.lora_rank"),
        ({"parameters": {"n_epochs": [1, 2]}}, {"hyperparameters": {"n_epochs": 3}}, "sweep.parameters.n_epochs"),
        # A small encoder trains all its weights unless told otherwise, and a smaller pool of negatives is easier.
        ({"parameters": {"lora_rank": [4, 8]}}, {"method": {"type": "classification"}}, "sweep.parameters.lora_rank"),
        ({"parameters": {"batch_size": [4, 8]}}, {"method": {"type": "embedding"}}, "sweep.parameters.batch_size"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_the_name_of_its_field(
    project_client: OpenAI, training_file: str, sweep: Any, extra: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(project_client, training_file, sweep, **extra)
    assert (caught.value.param, bool(caught.value.code)) == (param, True), caught.value.message
    assert project_client.fine_tuning.jobs.list().data == []


def test_a_multiplier_beside_a_varied_learning_rate_is_refused(project_client: OpenAI, training_file: str) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 2.0}}}
    with pytest.raises(openai.BadRequestError) as caught:
        create(project_client, training_file, GRID, method=method)
    assert caught.value.param == "method.supervised.hyperparameters.learning_rate_multiplier"


def test_trials_are_jobs_that_only_a_list_of_their_sweep_shows(
    project_client: OpenAI, platform: Platform, training_file: str
) -> None:
    sweep = create(project_client, training_file, GRID)
    (trial,) = begin(platform, sweep.id, 1)
    assert [job.id for job in project_client.fine_tuning.jobs.list()] == [sweep.id]
    listed = project_client.fine_tuning.jobs.list(extra_query={"parent": sweep.id}).data
    assert [job.id for job in listed] == [trial.id]
    one = project_client.fine_tuning.jobs.retrieve(trial.id)
    assert (shown(one, "kind"), shown(one, "parent"), shown(one, "trial")["number"]) == ("fine_tuning", sweep.id, 1)
    trials = shown(project_client.fine_tuning.jobs.retrieve(sweep.id), "sweep")["trials"]
    assert [(row["number"], row["job_id"], row["status"], row["parameters"]) for row in trials] == [
        (1, trial.id, "validating_files", {"learning_rate": RATES[0]}),
        (2, None, None, {"learning_rate": RATES[1]}),
    ]
    assert shown(project_client.fine_tuning.jobs.list().data[0], "sweep")["trials"] == trials


def test_the_trials_of_a_strange_or_unknown_sweep_are_not_found(
    project_client: OpenAI, new_client: NewClient, training_file: str
) -> None:
    sweep = create(project_client, training_file, GRID)
    for client, parent in ((new_client(), sweep.id), (project_client, "ftjob-none")):
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.list(extra_query={"parent": parent})


def test_a_wish_for_the_sweep_is_one_for_its_trials(
    project_client: OpenAI, platform: Platform, training_file: str
) -> None:
    sweep = create(project_client, training_file, GRID)
    trials = begin(platform, sweep.id, 2)
    project_client.fine_tuning.jobs.cancel(trials[0].id)  # one for itself alone

    def states() -> list[str]:
        return [project_client.fine_tuning.jobs.retrieve(trial.id).status for trial in trials]

    assert project_client.fine_tuning.jobs.pause(sweep.id).status == "pausing"
    assert states() == ["cancelled", "paused"]
    assert project_client.fine_tuning.jobs.resume(sweep.id).status == "running"
    assert states() == ["cancelled", "validating_files"]
    assert project_client.fine_tuning.jobs.cancel(sweep.id).status == "running"  # until its driver has seen to it
    assert states() == ["cancelled", "cancelled"]
