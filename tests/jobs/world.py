"""A whole job platform in one process: real SQLite, storage and orchestrator; training is the caller's choice."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.files.validation import run_validation
from service.jobs.launchers import InProcessLauncher
from service.jobs.orchestrator import Orchestrator
from service.jobs.publish import new_model_id
from service.jobs.rehearsal import Rehearsal
from service.jobs.run_driver import Fit
from service.jobs.states import JobState
from service.jobs.task_runners import InProcessTaskRunner
from service.serving.fleet import InProcessFleet
from service.settings import Settings
from service.store import events, files, instance, jobs, runs
from service.store.database import Database, new_id
from service.store.tables import Event, File, Job, Run
from tests.database import migrated
from training.spec import BaseRef, Hyperparameters, LoraSpec, TrainSpec
from training.storage import Storage

PROJECT = instance.DEFAULT_PROJECT
PATIENCE_S = 60.0
BASE = BaseRef(id="tiny", key="bases/none", content_hash="0" * 64)
GOOD_LINES = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}"} for n in range(12)]
RESOLVED = TrainSpec(
    base=BASE,
    training_key="files/none",
    adapter=LoraSpec(rank=4, alpha=8.0),
    hyperparameters=Hyperparameters(
        n_epochs=1,
        batch_size=4,
        learning_rate_multiplier=1.0,
        learning_rate=1e-3,
        gradient_accumulation_steps=1,
        max_length=128,
    ),
    precision="fp32",
    eval_interval=2,
    checkpoint_interval=2,
)


@dataclass
class World:
    """The parts, and short ways to use them."""

    settings: Settings
    db: Database
    storage: Storage
    launcher: InProcessLauncher
    runner: InProcessTaskRunner
    orchestrator: Orchestrator

    def upload(self, lines: list[Any], *, validate: bool = True) -> File:
        """A training file as the API leaves it."""
        data = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
        file_id = new_id("file-")
        self.storage.write_bytes(f"files/{file_id}", data)
        with self.db.write() as tx:
            files.create(
                tx,
                project_id=PROJECT,
                created_by=None,
                id=file_id,
                filename="train.jsonl",
                purpose="fine-tune",
                size_bytes=len(data),
                sha256="0" * 64,
                storage_key=f"files/{file_id}",
            )
        if validate:
            run_validation(self.db, self.storage, file_id)
        with self.db.read() as tx:
            file = files.by_id(tx, file_id)
        assert file is not None
        return file

    def create(self, file: File, spec: TrainSpec = RESOLVED, **fields: Any) -> Job:
        """A job as the API leaves it."""
        spec = spec.model_copy(update={"training_key": file.storage_key})
        values: dict[str, Any] = {
            "project_id": PROJECT,
            "created_by": None,
            "method": "supervised",
            "priority": 0,
            "base_id": spec.base.id,
            "training_file_id": file.id,
            "request": {},
            "request_hash": "0" * 64,
            "spec": spec.model_dump(mode="json"),
        }
        with self.db.write() as tx:
            return jobs.create(tx, **(values | fields))

    def queue(self, **fields: Any) -> Job:
        """A job whose plan is made, ready to be claimed."""
        workers = {name: fields.pop(name) for name in ("num_workers", "min_workers") if name in fields}
        spec = RESOLVED.model_copy(update=workers)
        job = self.create(self.upload(GOOD_LINES), spec, **fields)
        plan = {"model_id": new_model_id(job.base_id, "local", None), "capabilities": ["completions"]}
        with self.db.write() as tx:
            return jobs.move(tx, job.id, JobState.QUEUED, plan=plan)

    def job(self, job: Job) -> Job:
        """The job as it stands now."""
        with self.db.read() as tx:
            return jobs.by_id(tx, job.id)

    def run(self, job: Job) -> Run:
        """The job's newest run."""
        with self.db.read() as tx:
            run = runs.last(tx, job.id)
        assert run is not None
        return run

    def wish(self, what: Callable[..., Job], job: Job) -> Job:
        """One of `jobs.request_…`, as the API calls it."""
        with self.db.write() as tx:
            return what(tx, PROJECT, job.id)

    def events(self, job: Job) -> list[Event]:
        """All events of the job, oldest first."""
        with self.db.read() as tx:
            return events.after_seq(tx, job.id, 0, limit=10_000)

    def messages(self, job: Job) -> list[str]:
        """Their texts."""
        return [event.message for event in self.events(job)]

    def tick_until(self, is_done: Callable[[], bool]) -> None:
        """Tick until it is so; what the ticks started gets its time in between."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_done():
            assert time.monotonic() < deadline, "it did not happen"
            self.orchestrator.tick()
            self.runner.join(timeout_s=0.5)
            self.launcher.join(timeout_s=0.02)

    def tick_to(self, job: Job, state: JobState) -> Job:
        """Tick until the job is in the state."""
        self.tick_until(lambda: self.job(job).state == state)
        return self.job(job)

    def result_csv(self, job: Job) -> str:
        """The published result file."""
        with self.db.read() as tx:
            file = files.get(tx, PROJECT, self.job(job).result_file_ids[0])
        return io.BytesIO(self.storage.read_bytes(file.storage_key)).read().decode()


def make_world(home: Path, make_fit: Callable[[Storage], Fit] = Rehearsal, num_slots: int = 1, **changes: Any) -> World:
    """A platform on an empty home, or on what an earlier one left there."""
    settings = Settings(**({"home": home, "heartbeat_timeout_s": 30.0} | changes))
    db, storage = migrated(settings.resolved_database_url), Storage(settings.resolved_storage_url)
    with db.write() as tx:
        instance.get_or_create(tx)
    launcher = InProcessLauncher(settings, db, storage, make_fit(storage), num_slots)
    runner = InProcessTaskRunner(settings, db, storage)
    return World(settings, db, storage, launcher, runner, make_orchestrator(settings, db, launcher, runner))


def make_orchestrator(
    settings: Settings, db: Database, launcher: InProcessLauncher, runner: InProcessTaskRunner, holder: str = "first"
) -> Orchestrator:
    """Another orchestrator over the same platform."""
    return Orchestrator(settings, db, launcher, runner, InProcessFleet(), holder)
