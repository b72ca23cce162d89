"""The one place where training meets serving: a finished artifact becomes a model row, and its job succeeds.

Bytes first (verify every hash, write the result files), rows after: one transaction makes model, result files, events,
the job's success and the run's end visible together. Doing it twice does nothing.
"""

from __future__ import annotations

import logging
import secrets

from sqlalchemy.orm import Session

from service.jobs import endings, results
from service.jobs.states import Desired, JobState
from service.store import events, jobs, metrics, models, runs, tasks
from service.store.database import Database
from service.store.tables import Job, Model, Run
from training.artifact import BrokenFolder, Manifest, read_manifest, verify
from training.storage import Storage

log = logging.getLogger(__name__)


def run_key(job_id: str) -> str:
    """The job's folder in storage; all attempts share it."""
    return f"runs/{job_id}"


def artifact_key(job_id: str) -> str:
    """Where the job's servable result lies."""
    return f"{run_key(job_id)}/artifact"


def new_model_id(base_id: str, organization: str, suffix: str | None) -> str:
    """The id that the job's model will have; drawn once, so that checkpoints can carry it before the model exists."""
    return f"ft:{base_id}:{organization}:{suffix or ''}:{secrets.token_hex(6)}"


def find_leftover(storage: Storage, job_id: str, last_step: int) -> tuple[str, str] | None:
    """Key and manifest hash of an artifact that an earlier attempt finished but could not publish.

    One that is broken, or ahead of the rows, is removed, so that training writes it anew. Rows are stored in order:
    with the checkpoint of the run's last step, all numbers up to it are there. `last_step` is the last one recorded.
    """
    key = artifact_key(job_id)
    manifest = read_manifest(storage, key)
    if manifest is None:
        return None
    try:
        if manifest.last_step != last_step:
            raise BrokenFolder(f"{key}: of a run to step {manifest.last_step}, and rows were stored up to {last_step}")
        verify(storage, key, manifest.hash())
    except BrokenFolder:
        log.exception("removing an artifact of job %s", job_id)
        storage.delete(key)
        return None
    return key, manifest.hash()


def publish(db: Database, storage: Storage, run_id: str, epoch: int, key: str, manifest_hash: str) -> None:
    """Verify the artifact and publish it. BrokenFolder if its bytes are wrong, RunLost if the run no longer counts."""
    manifest = verify(storage, key, manifest_hash)
    with db.read() as tx:
        job_id = runs.get(tx, run_id).job_id
        text = results.as_csv(tx, job_id)
    made = results.write(storage, job_id, text, key, manifest)
    with db.write() as tx:
        run = runs.hold(tx, run_id, epoch)
        job = jobs.by_id(tx, run.job_id)
        if job.desired == Desired.CANCEL:  # asked for before the end: its owner wants no model
            endings.stopped(tx, run, step=manifest.step)
        else:
            _succeed(tx, job, run, key, manifest, made)


def _succeed(tx: Session, job: Job, run: Run, key: str, manifest: Manifest, made: list[results.ResultFile]) -> None:
    if not runs.end(tx, run.id, "succeeded"):
        return
    is_trial = job.parent_job_id is not None  # its sweep publishes the best trial's model
    model_id = None if is_trial else add_model(tx, job, _model_id(job), key, manifest).id
    result_files = [results.add_row(tx, job, result) for result in made]
    job = jobs.move(
        tx,
        job.id,
        JobState.SUCCEEDED,
        expect=endings.LIVE,
        fine_tuned_model=model_id,
        trained_tokens=metrics.trained_tokens(tx, job.id),
        result_file_ids=[file.id for file in result_files],
        estimated_finish_at=None,
        stop_requested_at=None,
    )
    _tell_success(tx, job)


def _tell_success(tx: Session, job: Job) -> None:
    if job.fine_tuned_model is not None:
        events.add(tx, job, f"New fine-tuned model created: {job.fine_tuned_model}", dedup_key=f"{job.id}:model")
    events.add(tx, job, "The job has successfully completed", dedup_key=f"{job.id}:succeeded")


def publish_best(db: Database, storage: Storage, run_id: str, epoch: int, best: Job) -> None:
    """Make the best trial's artifact the model of its sweep, whose run this is, and drop the other trials'.

    BrokenFolder if its bytes are wrong, RunLost if the run no longer counts."""
    key = artifact_key(best.id)
    manifest = read_manifest(storage, key)
    if manifest is None:
        raise BrokenFolder(f"{key}: no manifest")
    verify(storage, key, manifest.hash())
    with db.write() as tx:
        run = runs.hold(tx, run_id, epoch)
        sweep = jobs.by_id(tx, run.job_id)
        if sweep.desired == Desired.CANCEL:
            endings.stopped(tx, run, step=None)
        elif runs.end(tx, run.id, "succeeded"):
            _succeed_with(tx, sweep, best, add_model(tx, sweep, _model_id(sweep), key, manifest))


def _succeed_with(tx: Session, sweep: Job, best: Job, model: Model) -> None:
    trials = jobs.trials(tx, sweep)
    sweep = jobs.move(
        tx,
        sweep.id,
        JobState.SUCCEEDED,
        expect=endings.LIVE,
        fine_tuned_model=model.id,
        spec=best.spec,
        trained_tokens=sum(metrics.trained_tokens(tx, trial.id) for trial in trials),
        result_file_ids=best.result_file_ids,
        stop_requested_at=None,
    )
    for trial in trials:
        if trial.id != best.id and trial.state == JobState.SUCCEEDED:
            tasks.add(tx, "delete_folder", {"key": artifact_key(trial.id)})
    _tell_success(tx, sweep)


def _model_id(job: Job) -> str:
    assert job.plan is not None, "a job without a plan was run"
    return str(job.plan["model_id"])


def add_model(tx: Session, job: Job, model_id: str, key: str, manifest: Manifest, *, checkpoint: bool = False) -> Model:
    """Register a servable folder of the job."""
    assert job.plan is not None, "a job without a plan was run"
    assert manifest.spec is not None, f"{key} is not the folder of a run"
    return models.create(
        tx,
        project_id=job.project_id,
        created_by=job.created_by,
        id=model_id,
        kind="full" if manifest.spec.adapter is None else "adapter",
        is_checkpoint=checkpoint,
        base_id=job.base_id,
        base_content_hash=manifest.base_content_hash,
        parent_id=job.parent_model_id,
        job_id=job.id,
        step=manifest.step,
        capabilities=job.plan["capabilities"],
        storage_key=key,
        manifest_hash=manifest.hash(),
        fingerprint=manifest.fingerprint.model_dump(mode="json"),
        spec=manifest.spec.model_dump(mode="json"),
    )
