"""The run driver as a Ray actor: one per run, detached, so that it outlives the orchestrator that started it.

The train workers of its run end with it: killing this actor is how a run is killed.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from typing import Any

import ray

from service.jobs.recorder import RunRecorder
from service.jobs.run_driver import RunDriver
from service.logs import configure_logging
from service.metrics import HubClient, Metrics
from service.settings import Settings
from service.store import runs
from service.store.database import Database
from training.progress import ProgressItem, Wish
from training.spec import TrainSpec
from training.storage import Storage

LOST_GRACE_S = 5.0  # workers of a lost run hear of it from their next report; after this the actor ends them


class RunDriverActor:
    """Answers its workers while it drives, so it needs a few threads (`max_concurrency`)."""

    def __init__(self, settings: Settings, instance_id: str, run_id: str) -> None:
        configure_logging(settings.log_level)
        self._settings = settings
        self._db = Database(settings.resolved_database_url)
        storage = Storage(settings.resolved_storage_url)
        with self._db.read() as tx:
            run = runs.get(tx, run_id)
        assert run.num_workers is not None, "a run of an earlier version was started"
        self._num_workers = run.num_workers
        self._metrics = Metrics(_hub_client(instance_id))
        self._driver = RunDriver(self._db, storage, run, self._fit, settings, self._metrics)
        self._this = ray.get_runtime_context().current_actor
        threading.Thread(target=self._work, name="driver", daemon=True).start()
        threading.Thread(target=self._exit_when_lost, name="lost", daemon=True).start()

    def report(self, items: list[ProgressItem]) -> Wish:
        """For the train workers."""
        return self._driver.recorder.report(items)

    def ask_stop(self) -> None:
        """Checkpoint and stop at the next step."""
        self._driver.recorder.ask_stop()

    def _work(self) -> None:
        try:
            asyncio.run(_drive(self._driver, self._metrics))
        finally:
            self._exit()

    def _exit_when_lost(self) -> None:
        self._driver.recorder.lost.wait()
        threading.Event().wait(LOST_GRACE_S)
        self._exit()

    def _exit(self) -> None:
        self._db.close()
        ray.kill(self._this)  # a detached actor lingers until somebody ends it

    def _fit(self, spec: TrainSpec, run_key: str, recorder: RunRecorder) -> None:
        from training import ray_run

        settings = self._settings
        local_dir = settings.home_dir / "ray-train"
        try:
            ray_run.fit(
                spec,
                settings.resolved_storage_url,
                run_key,
                self._this,
                num_workers=self._num_workers,
                num_cpus_per_worker=settings.train_num_cpus,
                num_gpus_per_worker=settings.train_num_gpus,
                num_threads=settings.train_num_threads,
                pin_resources=settings.pin_resources,
                run_name=recorder.run_id,
                local_dir=str(local_dir),
            )
        except ray_run.NoRoom:
            recorder.requeue()
        finally:
            for leftover in (local_dir / recorder.run_id, local_dir / "scratch" / recorder.run_id):
                shutil.rmtree(leftover, ignore_errors=True)


async def _drive(driver: RunDriver, numbers: Metrics) -> None:
    """Not a method: one coroutine method would make the actor an asyncio actor, whose calls wait for each other."""
    async with numbers.pushing():
        await asyncio.to_thread(driver.work)


def _hub_client(instance_id: str) -> HubClient:
    from service.jobs.orchestrator_actor import hub_client  # not at the top: it imports this module

    return hub_client(instance_id)


def create(settings: Settings, instance_id: str, run_id: str) -> Any:
    """Start a run's driver; returns at once, the driver begins by itself."""
    options = {
        "name": actor_name(instance_id, run_id),
        "namespace": namespace(instance_id),
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": 0,
        "max_concurrency": 16,
        "resources": settings.pin_resources,
    }
    return ray.remote(RunDriverActor).options(**options).remote(settings, instance_id, run_id)


def namespace(instance_id: str) -> str:
    """Ray namespace of everything of this Tunesmith."""
    return f"tunesmith-{instance_id}"


def actor_name(instance_id: str, run_id: str) -> str:
    """Ray name of a run's driver."""
    return f"tunesmith-{instance_id}-run-{run_id}"
