"""Trackers get a job's whole curve once, whatever happens to its runs; and whatever happens to them, its runs go on."""

from __future__ import annotations

import logging
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from service.jobs.rehearsal import loss
from service.jobs.states import JobState
from service.settings import Settings
from service.store import jobs
from service.store.tables import Job, Metric
from service.trackers import feed
from service.trackers.chosen import why_no_wandb
from service.trackers.tracker import numbers
from service.up import UpError, running_service
from tests.jobs.gate import Build, gated
from tests.jobs.test_faults import crashing
from tests.jobs.wandb_server import offline_history, wandb_server
from tests.jobs.world import PATIENCE_S, World

KEY = "0123456789abcdef" * 2 + "01234567"
FAQ: dict[str, Any] = {"integrations": [{"type": "wandb", "wandb": {"project": "faq", "name": "try 1", "tags": ["a"]}}]}
WHOLE_CURVE = [(step, loss(step)) for step in range(1, 7)]


def finish(world: World, job: Job, state: JobState = JobState.SUCCEEDED) -> Job:
    """The job in its last state, and all its trackers told."""
    job = world.tick_to(job, state)
    assert world.launcher.join(PATIENCE_S)
    return job


def warnings(world: World, job: Job) -> list[str]:
    """Texts of the job's warnings that are about trackers."""
    return [event.message for event in world.events(job) if event.level == "warn" and "reached" in event.message]


# TensorBoard


def scalars(folder: Path | str, job_id: str, name: str) -> list[tuple[int, float]]:
    """What TensorBoard would draw."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loaded = loading.EventAccumulator(str(Path(folder) / job_id)).Reload()
    return [(point.step, pytest.approx(point.value)) for point in loaded.Scalars(name)]


def test_tensorboard_draws_the_curve_of_a_job_that_crashed_once(build: Build, tmp_path: Path) -> None:
    board = tmp_path / "board"
    world = crashing(build, step=4, tensorboard_dir=str(board))
    job = finish(world, world.queue())
    assert world.run(job).attempt == 2
    assert scalars(board, job.id, "train_loss") == WHOLE_CURVE
    assert [(step, 2 * value) for step, value in WHOLE_CURVE] == scalars(board, job.id, "valid_loss")
    assert [step for step, _ in scalars(board, job.id, "learning_rate")] == [1, 2, 3, 4, 5, 6]
    assert warnings(world, job) == []


# MLflow


@pytest.fixture
def mlflow_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracking store in a folder: SQLite would do as well, but takes seconds to migrate."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlflow").as_uri()


def mlflow_run(uri: str, job: Job) -> tuple[Any, list[tuple[int, float]]]:
    """The job's one run, and its training losses."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tunesmith")
    (run,) = client.search_runs([experiment.experiment_id], filter_string=f"tags.`tunesmith.job_id` = '{job.id}'")
    return run, [(value.step, value.value) for value in client.get_metric_history(run.info.run_id, "train_loss")]


def test_mlflow_keeps_one_run_per_job_with_each_step_once(build: Build, mlflow_uri: str) -> None:
    world = crashing(build, step=4, mlflow_tracking_uri=mlflow_uri)
    job = finish(world, world.queue())
    assert world.run(job).attempt == 2
    run, losses = mlflow_run(mlflow_uri, job)
    assert losses == WHOLE_CURVE
    assert run.data.metrics["valid_loss"] == 2 * loss(6)
    assert run.data.params["hyperparameters.learning_rate"] == "0.001"
    assert (run.info.status, run.info.run_name) == ("FINISHED", job.id)
    assert run.data.tags["tunesmith.fine_tuned_model"] == job.fine_tuned_model


def test_mlflow_shows_that_a_paused_job_goes_on_later(build: Build, mlflow_uri: str) -> None:
    world, gate = gated(build, step=3, mlflow_tracking_uri=mlflow_uri)
    job = world.queue()
    world.tick_until(gate.reached.is_set)
    world.wish(jobs.request_pause, job)
    gate.opened.set()
    finish(world, job, JobState.PAUSED)
    run, losses = mlflow_run(mlflow_uri, job)
    assert (run.info.status, losses) == ("SCHEDULED", WHOLE_CURVE[:3])
    world.wish(jobs.request_cancel, job)
    finish(world, job, JobState.CANCELLED)


# Weights & Biases


def test_wandb_continues_the_run_of_an_earlier_attempt(build: Build) -> None:
    pytest.importorskip("wandb")
    with wandb_server() as server:
        world = crashing(build, step=4, wandb_api_key=KEY, wandb_base_url=server.url)
        job = finish(world, world.queue(request=FAQ))
    assert warnings(world, job) == []
    assert {upsert["name"] for upsert in server.upserts} == {job.id}
    first = server.upserts[0]
    assert (first["project"], first["displayName"]) == ("faq", "try 1")
    assert (first["host"], first["program"]) == ("tunesmith", "tunesmith"), "our machines are nobody's business"
    assert first["tags"] == ["a", "tunesmith/finetune", "tunesmith/tiny", f"tunesmith/{job.id}"]
    assert '"hyperparameters.learning_rate":{"value":0.001}' in first["config"].replace(" ", "")
    assert [(line["_step"], line["train_loss"], line["valid_loss"]) for line in server.history] == [
        (step, value, 2 * value) for step, value in WHOLE_CURVE
    ]
    assert server.exit_codes == [1, 0]
    assert f"Weights & Biases run: {server.url}/me/faq/runs/{job.id}" in world.messages(job)
    assert not list((world.settings.home_dir / "wandb").iterdir()), "what was delivered is not kept"


def test_an_offline_wandb_run_is_whole_after_a_crash(build: Build) -> None:
    pytest.importorskip("wandb")
    world = crashing(build, step=4, wandb_offline=True)
    job = finish(world, world.queue(request=FAQ))
    rows = offline_history(world.settings.home_dir / "wandb" / job.id)
    assert [(row["_step"], row["train_loss"]) for row in rows] == WHOLE_CURVE
    assert warnings(world, job) == []


def test_a_refused_wandb_key_is_one_warning_and_shown_to_nobody(
    build: Build, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    caplog.set_level(logging.DEBUG)
    with wandb_server(refuses=True) as server:
        world = crashing(build, step=4, wandb_api_key=KEY, wandb_base_url=server.url)
        job = finish(world, world.queue(request=FAQ))
    assert server.was_asked
    assert len(warnings(world, job)) == 1
    assert warnings(world, job)[0].startswith("Weights & Biases could not be reached: ")
    said = "\n".join(world.messages(job)) + caplog.text + "".join(capfd.readouterr()) + repr(world.settings)
    assert KEY not in said


# Trouble


def test_what_is_not_installed_is_said_before_a_job_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("wandb", "mlflow", "tensorboard"):
        monkeypatch.setitem(sys.modules, library, None)
    settings = Settings(home=tmp_path, wandb_api_key=KEY, mlflow_tracking_uri="http://x", tensorboard_dir="/x")
    assert "install 'tunesmith[wandb]'" in (why_no_wandb(settings) or "")
    with pytest.raises(UpError, match=r"tunesmith\[mlflow\].*tunesmith\[tensorboard\]"), running_service(settings):
        pass


def test_a_tracker_that_nobody_answers_for_is_one_warning_without_its_password(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # taken, and never listened on
        port = unheard.getsockname()[1]
        world = crashing(build, step=4, mlflow_tracking_uri=f"http://me:secret-word@127.0.0.1:{port}")
        job = finish(world, world.queue())
    assert job.fine_tuned_model is not None
    assert len(warnings(world, job)) == 1
    assert warnings(world, job)[0].startswith("MLflow could not be reached: ")
    assert "secret-word" not in "\n".join(world.messages(job)) + caplog.text


def test_a_tracker_that_hangs_holds_nobody_up(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setattr(feed, "FLUSH_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        world = build(mlflow_tracking_uri=uri)
        job = finish(world, world.queue())
        assert warnings(world, job) == [
            "MLflow could not be reached: it did not take the last numbers within 0.1 s. The job does not depend on it."
        ]


def test_a_tracker_that_comes_back_gets_what_it_missed(build: Build, tmp_path: Path) -> None:
    board = tmp_path / "board"
    board.write_text("a file where the folder should be")
    world, gate = gated(build, step=4, tensorboard_dir=str(board))
    job = world.queue()
    world.tick_until(lambda: gate.reached.is_set() and bool(warnings(world, job)))
    board.unlink()
    gate.opened.set()
    finish(world, job)
    assert scalars(board, job.id, "train_loss") == WHOLE_CURVE
    assert len(warnings(world, job)) == 1


def test_a_methods_own_numbers_are_drawn_beside_the_losses() -> None:
    row = Metric(kind="step", step=1, data={"train_loss": 1, "total_steps": 9, "means": {"train_reward_margin": 0.5}})
    assert numbers(row) == {"train_loss": 1.0, "train_reward_margin": 0.5}
