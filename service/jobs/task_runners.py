"""Where worker tasks run: in Ray workers beside the orchestrator, or in a thread pool of this process."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from service.jobs.tasks import Workbench, execute, warm_up
from service.logs import configure_logging
from service.settings import Settings
from service.store.database import Database
from service.store.tables import Task
from training.storage import Storage

log = logging.getLogger(__name__)

NUM_SLOTS = 8
HEAVY_KINDS = {"import_base"}  # import torch and use whole cores: a process of their own, which ends with them


class TaskRunner(Protocol):
    """Starts claimed tasks; the tasks store by themselves how they went. No method may block."""

    def num_free(self) -> int:
        """How many more tasks may be claimed now."""
        ...

    def start(self, task: Task) -> None:
        """Begin a claimed task."""
        ...

    def take_lost(self) -> list[Task]:
        """Tasks whose worker died since the last call: they stored nothing."""
        ...


class InProcessTaskRunner:
    """A few threads of this process: for notebooks and tests."""

    def __init__(self, settings: Settings, db: Database, storage: Storage) -> None:
        self._bench = Workbench(settings, db, storage)
        self._pool = ThreadPoolExecutor(max_workers=NUM_SLOTS, thread_name_prefix="task")
        self._running: set[Future[None]] = set()

    def num_free(self) -> int:
        """Slots without a running task."""
        self._running = {future for future in self._running if not future.done()}
        return NUM_SLOTS - len(self._running)

    def start(self, task: Task) -> None:
        """Hand the task to the pool."""
        self._running.add(self._pool.submit(execute, self._bench, task))

    def take_lost(self) -> list[Task]:
        """Threads die with this process only."""
        return []

    def join(self, timeout_s: float) -> bool:
        """Wait for all running tasks; whether they ended."""
        return not wait(list(self._running), timeout=timeout_s).not_done

    def close(self) -> None:
        """Let running tasks end, take no more."""
        self._pool.shutdown(wait=True)


class TaskWorker:
    """Body of the warm Ray actor: imports and connections are made once, so that a task starts in milliseconds."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.log_level)
        self._bench = _bench(settings)
        warm_up()

    def run(self, task: Task) -> None:
        """Do one task."""
        execute(self._bench, task)


def _bench(settings: Settings) -> Workbench:
    return Workbench(settings, Database(settings.resolved_database_url), Storage(settings.resolved_storage_url))


def _run_heavy(settings: Settings, task: Task) -> None:
    configure_logging(settings.log_level)
    bench = _bench(settings)
    try:
        execute(bench, task)
    finally:
        bench.db.close()


class RayTaskRunner:
    """One warm 0-CPU actor for light tasks, a Ray task of its own for each heavy one."""

    def __init__(self, settings: Settings, resources: dict[str, float]) -> None:
        """`resources` pins the workers to the node that holds the state."""
        self._settings, self._resources = settings, resources
        self._running: dict[Any, Task] = {}
        self._worker = self._start_worker()

    def num_free(self) -> int:
        """Slots without a running task."""
        return NUM_SLOTS - len(self._running)

    def start(self, task: Task) -> None:
        """Send the task to its worker."""
        import ray

        if task.kind in HEAVY_KINDS:
            heavy = ray.remote(_run_heavy).options(num_cpus=0, max_retries=0, resources=self._resources)
            self._running[heavy.remote(self._settings, task)] = task
        else:
            self._running[self._worker.run.remote(task)] = task

    def take_lost(self) -> list[Task]:
        """Collect what ended; a Ray error means that the worker did not live to store the outcome."""
        import ray

        if not self._running:
            return []
        done, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        lost = []
        for ref in done:
            task = self._running.pop(ref)
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                log.warning("worker of task %s (%s) was lost: %s", task.id, task.kind, error)
                lost.append(task)
        return lost

    def close(self) -> None:
        """End the warm worker; its tasks run again elsewhere after their lease."""
        import ray

        ray.kill(self._worker)

    def _start_worker(self) -> Any:
        import ray

        options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": NUM_SLOTS, "resources": self._resources}
        return ray.remote(TaskWorker).options(**options).remote(self._settings)
