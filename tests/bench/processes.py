"""Training runs as processes of their own: ours, as a user starts it without the service, and what its figures say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.spec import TrainSpec

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".peers/trl/bin/python"
TRL_SFT = ROOT / "tests/bench/peers/trl_sft.py"


@dataclass(frozen=True)
class Speed:
    """One run's figures."""

    tokens_per_s: float
    rss_bytes: int


def measured(command: list[str], num_threads: int = 0) -> tuple[str, int]:
    """Output and peak memory of a process; RuntimeError with the end of what it said if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if num_threads:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    with (
        tempfile.TemporaryDirectory() as cache,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        environment["HF_DATASETS_CACHE"] = cache
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command[:4]} failed:\n{out.read()[-1000:]}\n{err.read()[-3000:]}")
        return out.read(), usage.ru_maxrss * 1024


def train(spec: TrainSpec, folder: Path, name: str, num_threads: int = 0) -> tuple[list[dict[str, Any]], int]:
    """`python -m training` in `folder`, its storage: the run `runs/NAME`, its steps and peak memory."""
    run_dir, spec_file = folder / "runs" / name, folder / f"{name}.json"
    spec_file.write_text(spec.model_dump_json())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(spec.num_workers)]
    command = [sys.executable, *(launcher if spec.num_workers > 1 else []), "-m", "training", str(spec_file)]
    command += ["--run-dir", str(run_dir), "--storage", str(folder)]
    _, rss = measured(command, num_threads)
    items = [json.loads(line) for line in (run_dir / "progress.jsonl").read_text().splitlines()]
    return [item for item in items if item["kind"] == "step"], rss


def train_peer(settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A run of the peer with the fields of `Settings` in its script: what that prints last, and peak memory."""
    output, rss = measured([str(PEER), str(TRL_SFT), json.dumps(settings)])
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result, rss


def tokens_per_s(at: list[float], num_tokens: list[int], num_warmup_steps: int) -> float:
    """Tokens of the steps after the first ones over the time from the end of those to the end of the last."""
    return sum(num_tokens[num_warmup_steps:]) / (at[-1] - at[num_warmup_steps - 1])
