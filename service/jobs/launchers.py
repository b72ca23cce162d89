"""Where runs work: as Ray actors on a cluster, or as threads of this process. Both drive a run with `RunDriver`.

A launcher holds no truth: which runs exist is in the database, and a launcher of a new process finds the drivers that
the old one started.
"""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from service.jobs.recorder import RunRecorder
from service.jobs.run_driver import Fit, RunDriver
from service.settings import Settings
from service.store.database import Database
from service.store.tables import Run
from training.progress import ProgressItem, Wish
from training.spec import TrainSpec
from training.storage import Storage

PLACING_S = 20.0  # Ray Train takes its resources up to this long after its driver started


class Launcher(Protocol):
    """What the orchestrator needs to know about the place where runs work. No method may block."""

    def start(self, run: Run) -> None:
        """Start the run's driver."""
        ...

    def is_alive(self, run_id: str) -> bool:
        """Whether the run's driver exists; False is certain."""
        ...

    def ask_stop(self, run_id: str) -> None:
        """Have the run checkpoint and stop, whatever its owner wants. May be asked again and again."""
        ...

    def kill(self, run_id: str) -> None:
        """End the driver and its workers without asking; nothing happens if there is none."""
        ...

    def num_free(self) -> int:
        """How many train workers find room now, besides what was started a moment ago."""
        ...

    def num_slots(self) -> int:
        """How many train workers would find room if nothing else ran."""
        ...


@dataclass(frozen=True)
class _Claim:
    num_workers: int
    until: float  # monotonic


class RayLauncher:
    """A detached, named actor per run; train workers are placed by Ray Train."""

    def __init__(self, settings: Settings, instance_id: str) -> None:
        self._settings, self._instance_id = settings, instance_id
        self._claims: dict[str, _Claim] = {}  # by run: started, perhaps not yet placed

    def start(self, run: Run) -> None:
        """Create the driver; its constructor runs elsewhere and later."""
        from service.jobs import run_actor

        self._claims[run.id] = _Claim(run.num_workers or 0, time.monotonic() + PLACING_S)
        run_actor.create(self._settings, self._instance_id, run.id)

    def is_alive(self, run_id: str) -> bool:
        """By name, so it holds for drivers that a former orchestrator started."""
        return self._find(run_id) is not None

    def ask_stop(self, run_id: str) -> None:
        """Sent without waiting for the answer."""
        driver = self._find(run_id)
        if driver is not None:
            driver.ask_stop.remote()

    def kill(self, run_id: str) -> None:
        """Ray Train's workers end with the driver, and their resources come back within seconds."""
        import ray

        self._claims.pop(run_id, None)
        driver = self._find(run_id)
        if driver is not None:
            ray.kill(driver)

    def num_free(self) -> int:
        """In what Ray has free, less what was claimed but perhaps not yet placed."""
        from ray._private import state

        moment = time.monotonic()
        self._claims = {id_: claim for id_, claim in self._claims.items() if claim.until > moment and self._find(id_)}
        claimed = sum(claim.num_workers for claim in self._claims.values())
        return max(0, self._num_within(state.available_resources_per_node()) - claimed)

    def num_slots(self) -> int:
        """In what the nodes that live now have in total."""
        from ray._private import state

        return self._num_within(state.total_resources_per_node())

    def _num_within(self, nodes: dict[str, dict[str, float]]) -> int:
        """Node by node: halves of a worker's resources on two nodes are no room for it."""
        each = {
            "CPU": self._settings.train_num_cpus,
            "GPU": self._settings.train_num_gpus,
            **self._settings.pin_resources,
        }
        return sum(
            min(int((node.get(name, 0.0) + 1e-6) / need) for name, need in each.items() if need)
            for node in nodes.values()
        )

    def _find(self, run_id: str) -> Any | None:
        import ray

        from service.jobs import run_actor

        try:
            return ray.get_actor(
                run_actor.actor_name(self._instance_id, run_id), namespace=run_actor.namespace(self._instance_id)
            )
        except ValueError:  # Ray's way to say that there is no such actor
            return None


class LoopFit:
    """A `Fit`: the real training loop, on the calling thread, as the only worker."""

    def __init__(self, storage: Storage, scratch_dir: Path) -> None:
        self._storage, self._scratch_dir = storage, scratch_dir

    def __call__(self, spec: TrainSpec, run_key: str, recorder: RunRecorder) -> None:
        """Train to the run's end."""
        from training import loop

        scratch_dir = self._scratch_dir / recorder.run_id
        try:
            loop.run(spec, self._storage, run_key, _DirectChannel(recorder), scratch_dir)
        finally:
            shutil.rmtree(scratch_dir, ignore_errors=True)


@dataclass(frozen=True)
class _DirectChannel:
    recorder: RunRecorder

    def send(self, items: list[ProgressItem]) -> Wish:
        return self.recorder.report(items)


@dataclass(frozen=True)
class _Local:
    driver: RunDriver
    thread: threading.Thread
    num_workers: int


class InProcessLauncher:
    """Runs as threads of this process: for notebooks and tests, and wherever there is no cluster."""

    def __init__(self, settings: Settings, db: Database, storage: Storage, fit: Fit, num_slots: int = 1) -> None:
        """`num_slots` is how many train workers have room."""
        self._settings, self._db, self._storage, self._fit, self._num_slots = settings, db, storage, fit, num_slots
        self._locals: dict[str, _Local] = {}

    def start(self, run: Run) -> None:
        """Start the driver's thread."""
        driver = RunDriver(self._db, self._storage, run, self._fit, self._settings)
        thread = threading.Thread(target=driver.work, name=f"run-{run.id}", daemon=True)
        self._locals[run.id] = _Local(driver, thread, run.num_workers or 0)
        thread.start()

    def is_alive(self, run_id: str) -> bool:
        """Whether the thread still works for the run."""
        local = self._locals.get(run_id)
        return local is not None and local.thread.is_alive() and not local.driver.recorder.lost.is_set()

    def ask_stop(self, run_id: str) -> None:
        """Flag the recorder; the next report carries the wish."""
        if run_id in self._locals:
            self._locals[run_id].driver.recorder.ask_stop()

    def kill(self, run_id: str) -> None:
        """A thread cannot be killed: the run's next report is refused, which ends it."""
        if run_id in self._locals:
            self._locals[run_id].driver.recorder.abandon()

    def num_free(self) -> int:
        """Slots of live threads are taken."""
        self._locals = {id_: local for id_, local in self._locals.items() if local.thread.is_alive()}
        return self._num_slots - sum(local.num_workers for local in self._locals.values())

    def num_slots(self) -> int:
        """As many as were given."""
        return self._num_slots

    def join(self, timeout_s: float) -> bool:
        """Wait for all runs to end; whether they did."""
        deadline = time.monotonic() + timeout_s
        for local in list(self._locals.values()):
            local.thread.join(max(0.0, deadline - time.monotonic()))
        return not any(local.thread.is_alive() for local in self._locals.values())
