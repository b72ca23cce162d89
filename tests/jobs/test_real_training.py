"""The same life with the real planner and the real training loop, on a real model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from sqlalchemy import select

from service.jobs.launchers import LoopFit
from service.jobs.states import JobState
from service.jobs.tasks import Workbench, import_base
from service.store import bases, checkpoints, jobs, metrics, models, tasks
from service.store.tables import BaseModel, Checkpoint
from tests.jobs.world import GOOD_LINES, PROJECT, World
from tests.shared import MODELS, needs_shared
from training.artifact import verify
from training.spec import BaseRef, EarlyStopping, Hyperparameters, TrainSpec
from training.storage import Storage

pytestmark = needs_shared

Build = Callable[..., World]


@pytest.fixture
def world(build: Build, tmp_path: Path) -> World:
    """A platform that really trains."""
    return build(make_fit=lambda storage: LoopFit(storage, tmp_path / "scratch"))


def add_base(world: World, source: str) -> BaseModel:
    """Import a base as the API and the worker task do, however that ends."""
    with world.db.write() as tx:
        bases.add(tx, project_id=PROJECT, created_by=None, id="tiny", source=source, revision=None)
        tasks.add(tx, "import_base", {"base_id": "tiny"})

    def find() -> BaseModel:
        with world.db.read() as tx:
            return bases.get(tx, "tiny")

    world.tick_until(lambda: find().status != "preparing")
    return find()


def spec_on(base: BaseModel, **changes: Any) -> TrainSpec:
    """A short run on the base, nearly all of it on auto."""
    assert base.storage_key is not None
    assert base.content_hash is not None
    fields: dict[str, Any] = {
        "hyperparameters": Hyperparameters(n_epochs=2, batch_size=4),
        "validation_split": 0.2,
        "checkpoint_interval": 2,
    }
    ref = BaseRef(id=base.id, key=base.storage_key, content_hash=base.content_hash)
    return TrainSpec(base=ref, training_key="-", **(fields | changes))


def test_a_job_is_planned_trained_and_published(world: World) -> None:
    base = add_base(world, str(MODELS / "stories260K"))
    assert base.status == "ready", base.status_details
    job = world.tick_to(world.create(world.upload(GOOD_LINES), spec_on(base)), JobState.SUCCEEDED)
    assert TrainSpec.model_validate(job.spec).unresolved() == []
    with world.db.read() as tx:
        model = models.get(tx, PROJECT, job.fine_tuned_model or "")
    assert model.capabilities == base.capabilities
    verify(world.storage, model.storage_key, model.manifest_hash)
    texts = world.messages(job)
    assert "Files validated, moving job to queued state" in texts
    assert any(text.startswith("Step 1/") for text in texts)


def test_a_paused_and_resumed_job_gives_the_result_of_an_uninterrupted_one(world: World) -> None:
    base = add_base(world, str(MODELS / "stories260K"))
    file = world.upload(GOOD_LINES)
    whole = world.tick_to(world.create(file, spec_on(base)), JobState.SUCCEEDED)
    job = world.create(file, spec_on(base))
    world.tick_to(job, JobState.QUEUED)
    world.tick_until(lambda: world.job(job).state != JobState.QUEUED)
    if world.job(job).state == JobState.RUNNING:
        world.wish(jobs.request_pause, job)
        world.tick_until(lambda: world.job(job).state in (JobState.PAUSED, JobState.SUCCEEDED))
    if world.job(job).state == JobState.PAUSED:
        world.wish(jobs.request_resume, job)
    world.tick_to(job, JobState.SUCCEEDED)
    assert world.result_csv(job) == world.result_csv(whole)
    assert world.job(job).trained_tokens == whole.trained_tokens


def test_a_job_that_stops_early_succeeds_with_its_best_step(world: World) -> None:
    base = add_base(world, str(MODELS / "stories260K"))
    hyper = Hyperparameters(n_epochs=30, batch_size=4, learning_rate=0.05, lr_scheduler="constant")
    spec = spec_on(base, hyperparameters=hyper, eval_interval=1, early_stopping=EarlyStopping(patience=2))
    job = world.tick_to(world.create(world.upload(GOOD_LINES), spec), JobState.SUCCEEDED)
    assert job.plan is not None
    rows = [line.split(",") for line in world.result_csv(job).splitlines()[1:]]
    last = int(rows[-1][0])
    assert [int(row[0]) for row in rows] == list(range(1, last + 1))
    assert last < job.plan["total_steps"]
    best = min(rows, key=lambda row: float(row[3]))
    with world.db.read() as tx:
        model = models.get(tx, PROJECT, job.fine_tuned_model or "")
        curve = metrics.merged(tx, job.id, "step")
        assert any(row.step == model.step for row in tx.scalars(select(Checkpoint).where(*checkpoints.of_job(job.id))))
    assert model.step == int(best[0]) == last - 2
    assert job.trained_tokens == sum(row.data["num_trained_tokens"] for row in curve)
    assert job.estimated_finish_at is None
    assert any(text.startswith(f"Stopped early at step {last}: ") for text in world.messages(job))
    assert any(text.startswith(f"The model is the checkpoint of step {best[0]},") for text in world.messages(job))


def test_a_job_that_cannot_work_fails_before_it_is_queued(world: World) -> None:
    base = add_base(world, str(MODELS / "stories260K"))
    job = world.tick_to(world.create(world.upload(GOOD_LINES[:3]), spec_on(base)), JobState.FAILED)
    assert job.error is not None
    assert job.error["message"]
    assert job.started_at is None


def test_a_job_that_needs_more_memory_than_there_is_says_so_before_it_starts(world: World) -> None:
    base = add_base(world, str(MODELS / "stories260K"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    many = memory // 500_000_000 + 1  # each worker is a process of more than that
    spec = spec_on(base, hyperparameters=Hyperparameters(batch_size=many), num_workers=many)
    job = world.tick_to(world.create(world.upload(GOOD_LINES), spec), JobState.QUEUED)
    assert [text for text in world.messages(job) if "this machine has" in text]


@pytest.mark.parametrize("eval_interval", [1, 100], ids=["seen-by-validation", "seen-by-training"])
def test_a_rate_that_diverges_fails_the_job_at_once_and_leaves_the_service_alive(
    world: World, eval_interval: int
) -> None:
    base = add_base(world, str(MODELS / "stories260K"))
    hyper = Hyperparameters(n_epochs=2, batch_size=4, learning_rate=1e30, warmup_ratio=0.0)
    spec = spec_on(base, hyperparameters=hyper, eval_interval=eval_interval, checkpoint_interval=100)
    job = world.tick_to(world.create(world.upload(GOOD_LINES), spec), JobState.FAILED)
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == (
        "loss_not_finite",
        "method.supervised.hyperparameters.learning_rate",
    )
    assert world.run(job).attempt == 1, "nothing that another attempt would mend"
    world.tick_to(world.create(world.upload(GOOD_LINES), spec_on(base)), JobState.SUCCEEDED)


def test_a_base_that_cannot_be_used_says_why(world: World, tmp_path: Path) -> None:
    base = add_base(world, str(tmp_path / "nothing-here"))
    assert base.status == "error"
    assert "nothing-here" in (base.status_details or "")


def test_an_import_does_not_answer_for_a_base_that_was_added_anew_from_elsewhere(world: World) -> None:
    with world.db.write() as tx:
        source = str(MODELS / "stories260K")
        bases.add(tx, project_id=PROJECT, created_by=None, id="tiny", source=source, revision=None)
    storage = MeanwhileAddedAnew(world)
    import_base(Workbench(world.settings, world.db, storage), {"base_id": "tiny"})
    with world.db.read() as tx:
        base = bases.get(tx, "tiny")
    assert (base.status, base.source, base.storage_key) == ("preparing", "elsewhere", None)


class MeanwhileAddedAnew(Storage):
    """While the first file is written, an administrator deletes the base and adds another one of its name."""

    def __init__(self, world: World) -> None:
        super().__init__(world.storage.url)
        self.world, self.is_done = world, False

    def open_write(self, key: str) -> IO[bytes]:
        """Write as ever."""
        if not self.is_done:
            self.is_done = True
            with self.world.db.write() as tx:
                bases.delete(tx, "tiny")
                bases.add(tx, project_id=PROJECT, created_by=None, id="tiny", source="elsewhere", revision=None)
        return super().open_write(key)
