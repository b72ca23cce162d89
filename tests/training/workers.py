"""The command line with the workers of a run, forked from one process that has imported what all of them need.

They are what torchrun would start: processes of their own that find one another, and one another's numbers, in the
environment and in the store of their launcher. Only the seconds that each of them takes to import torch are saved.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from training.spec import TrainSpec
from training.storage import Storage

PATIENCE_S = 240
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "tests.training.workers",
        "training.loop",
        "transformers.models.bert.modeling_bert",
        "transformers.models.llama.modeling_llama",
    ]
)


def arguments(storage: Storage, spec: TrainSpec, run: str) -> list[str]:
    """What the command line is told of a run."""
    file = Path(storage.path(f"{run}.json"))
    file.parent.mkdir(exist_ok=True)
    file.write_text(spec.model_dump_json())
    return [str(file), "--run-dir", storage.path(run), "--storage", storage.url]


def train(storage: Storage, spec: TrainSpec, run: str, num_workers: int | None = None) -> list[dict[str, Any]]:
    """Run to the end, with the spec's number of workers by default; the steps and evaluations of this attempt."""
    before = len(_progress(storage, run))
    _work(arguments(storage, spec, run), num_workers or spec.num_workers, Path(storage.path(run)))
    return numbers(storage, run)[before:]


def numbers(storage: Storage, run: str) -> list[dict[str, Any]]:
    """The steps and evaluations of all attempts, without what differs from one to the next."""
    items = [{**item, **item["means"]} for item in _progress(storage, run)]
    return [{k: v for k, v in item.items() if k not in ("seq", "at", "tokens_per_s", "means")} for item in items]


def _progress(storage: Storage, run: str) -> list[dict[str, Any]]:
    file = Path(storage.path(run)) / "progress.jsonl"
    items = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [item for item in items if item["kind"] in ("step", "eval")]


def _work(words: list[str], num_workers: int, folder: Path) -> None:
    """All workers of one attempt. AssertionError with what they wrote when one fails, which ends the others."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [folder.with_name(f"{folder.name}-{rank}.log") for rank in range(num_workers)]
    environments = [_environment(rank, num_workers, store.port) for rank in range(num_workers)]
    processes = [
        _forks.Process(target=_main, args=(words, environment, log), daemon=True)
        for environment, log in zip(environments, logs, strict=True)
    ]
    for process in processes:
        process.start()
    waiting, give_up_at = {process.sentinel: process for process in processes}, time.monotonic() + PATIENCE_S
    while waiting and not any(process.exitcode for process in processes) and time.monotonic() < give_up_at:
        for sentinel in wait(list(waiting), timeout=1.0):
            waiting.pop(sentinel).join()
    for process in waiting.values():
        process.kill()
        process.join()
    said = "\n".join(f"worker {rank}: {log.read_text()}" for rank, log in enumerate(logs) if log.exists())
    assert [process.exitcode for process in processes] == [0] * num_workers, said


def _environment(rank: int, num_workers: int, port: int) -> dict[str, str]:
    """What torchrun tells a worker; one that is alone is told nothing."""
    if num_workers == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": str(num_workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # its launcher's, whose port nobody else can take in between
    }


def _main(words: list[str], environment: dict[str, str], log: Path) -> None:
    """Body of a worker."""
    import torch

    from training.__main__ import main

    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
        os.environ.update(environment)
        torch.set_num_threads(1)
        sys.argv = ["training", *words]
        sys.exit(main())
