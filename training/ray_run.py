"""Ray Train around the loop; the only file of training that knows Ray.

Nothing goes through `train.report`, which costs seconds: progress and wishes go straight to the owner's actor. The
owner also retries: a worker that crashes ends `fit` with an exception, and nothing is restarted here.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import ray
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from training.progress import ProgressItem, Wish
from training.spec import TrainSpec


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
    num_cpus_per_worker: float,
    num_gpus_per_worker: float,
    num_threads: int,
    pin_resources: dict[str, float],
    run_name: str,
    local_dir: str,
) -> None:
    """Run the loop on `spec.num_workers` workers and wait for their end. Failed runs return; crashes raise.

    `channel_actor.report(items)` answers with a `Wish`. `num_threads=0` shares a machine's cores among its workers.
    """
    resources = {"CPU": num_cpus_per_worker, **pin_resources}
    if num_gpus_per_worker:
        resources["GPU"] = num_gpus_per_worker
    trainer = _trainer_class(spec)(
        _work,
        train_loop_config={
            "spec": spec,
            "storage_url": storage_url,
            "run_key": run_key,
            "channel_actor": channel_actor,
            "num_threads": num_threads,
            "scratch_dir": str(Path(local_dir) / "scratch" / run_name),
        },
        scaling_config=ScalingConfig(
            num_workers=spec.num_workers, use_gpu=num_gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # mypy reads the v1 name
            name=run_name,
            storage_path=str(Path(local_dir).absolute()),
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    trainer.fit()


def _trainer_class(spec: TrainSpec) -> type[DataParallelTrainer]:
    """One worker needs no process group, and starts faster without."""
    if spec.num_workers == 1:
        return DataParallelTrainer
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    return TorchTrainer


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
