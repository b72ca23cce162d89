"""Ray Train around the loop; the only file of training that knows Ray.

Nothing goes through `train.report`, which costs seconds: progress and wishes go straight to the owner's actor. The
owner also retries: a worker that crashes ends `fit` with an exception, and nothing is restarted here.

Ray Train 2.60 starts five processes of its own before a worker may run; each imports Ray Train for two seconds of CPU.
We keep what a run of ours needs (see `_Trainer`), which halves the time to the first step on a small machine. These
are internals of Ray, so the version of Ray is bound in `pyproject.toml`, and a test runs them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import ray
from ray.train.backend import BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError

from training.progress import ProgressItem, Wish
from training.spec import TrainSpec

_POLL_S = 0.5  # how soon the end or the crash of a worker is seen


class NoRoom(Exception):
    """The workers were not placed in time, and nothing was trained."""


class ActorChannel:
    """Progress as calls of the owner's actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def send(self, items: list[ProgressItem]) -> Wish:
        """One call, answered with the wish; an owner that is gone or stuck is an exception."""
        return Wish(ray.get(self._actor.report.remote(items), timeout=30))


def fit(
    spec: TrainSpec,
    storage_url: str,
    run_key: str,
    channel_actor: Any,
    *,
    num_workers: int,
    num_cpus_per_worker: float,
    num_gpus_per_worker: float,
    num_threads: int,
    pin_resources: dict[str, float],
    run_name: str,
    local_dir: str,
) -> None:
    """Run the loop on so many workers, within the spec's range, and wait for their end. Failed runs return; crashes
    raise. NoRoom when the workers were not placed in time and fewer would do.

    Call it from an actor, whose end, however it comes, ends the workers; a detached one gives their resources back at
    once. `channel_actor.report(items)` answers with a `Wish`. `num_threads=0` shares a machine's cores among its
    workers.
    """
    resources = {"CPU": num_cpus_per_worker, **pin_resources}
    if num_gpus_per_worker:
        resources["GPU"] = num_gpus_per_worker
    may_be_fewer = num_workers > spec.least_workers()
    trainer = _Trainer(
        _work,
        train_loop_config={
            "spec": spec,
            "storage_url": storage_url,
            "run_key": run_key,
            "channel_actor": channel_actor,
            "num_threads": num_threads,
            "scratch_dir": str(Path(local_dir) / "scratch" / run_name),
        },
        backend_config=_backend(num_workers, use_gpu=num_gpus_per_worker > 0),
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=num_gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # mypy reads the v1 name
            name=run_name,
            storage_path=str(Path(local_dir).absolute()),
            # -1: a number that cannot be less waits for its place as long as its owner wants.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0 if may_be_fewer else -1),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    except ControllerError as error:
        if may_be_fewer and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise NoRoom(f"no room for {num_workers} workers") from error
        raise


class _Trainer(DataParallelTrainer):
    """A trainer that runs its controller in this process, without the helpers that a run of ours has no use for.

    - Placement groups made by a detached actor are removed by Ray itself when the actor ends, so no cleaner.
    - No data sets of Ray's, so no data set manager.
    - Wishes come through our channel, so nobody watches for preemption.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        kwargs["scaling_policy"] = _FixedSize(self.scaling_config)  # type: ignore[arg-type]  # the v1 name again
        controller = _Controller(**kwargs)
        asyncio.run(controller.run())
        return controller.get_result()


class _Controller(TrainController):
    """Ray Train's controller, quicker to see the end."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._health_check_interval_s = _POLL_S
        kept = [c for c in self._worker_group_callbacks_to_propagate if not isinstance(c, PreemptionCallback)]
        self._worker_group_callbacks_to_propagate = kept


class _FixedSize(FixedScalingPolicy):
    """Workers as asked for. The placement group alone makes an autoscaler act; no coordinator has to hear of it.

    Nor does Ray's `ElasticScalingPolicy` serve for a range: it counts whole nodes, without what engines and other runs
    hold there, and resizes by killing a group between two checkpoints. The owner counts, anew for each attempt.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Start no coordinator."""

    def _maybe_send_resource_request(self) -> None:
        """Tell none."""

    def _cancel_resource_request(self) -> None:
        """Take nothing back."""


def _backend(num_workers: int, use_gpu: bool) -> BackendConfig:
    """A process group for several workers; one needs none, and starts faster without."""
    if num_workers == 1:
        return BackendConfig()
    from ray.train.torch import TorchConfig

    return TorchConfig(backend="nccl" if use_gpu else "gloo")


def _fair_share(num_local_workers: int) -> int:
    """Threads for each of a machine's workers. Ray's own default is one per reserved CPU."""
    return max(1, len(os.sched_getaffinity(0)) // num_local_workers)


def _work(config: dict[str, Any]) -> None:
    """What every train worker does."""
    import torch

    from training import loop
    from training.storage import Storage

    logging.getLogger("transformers").setLevel(logging.ERROR)
    context = ray.train.get_context()
    torch.set_num_threads(config["num_threads"] or _fair_share(context.get_local_world_size()))
    if torch.cuda.is_available():
        torch.cuda.set_device(context.get_local_rank() % torch.cuda.device_count())
    scratch_dir = Path(config["scratch_dir"]) / f"rank-{context.get_world_rank()}"
    channel = ActorChannel(config["channel_actor"])
    try:
        loop.run(config["spec"], Storage(config["storage_url"]), config["run_key"], channel, scratch_dir)
    finally:
        shutil.rmtree(scratch_dir, ignore_errors=True)
