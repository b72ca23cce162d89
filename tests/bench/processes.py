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
PEERS = ROOT / "tests/bench/peers"
USAGE = ROOT / "tests/bench/usage.py"


@dataclass(frozen=True)
class Speed:
    """One run's figures."""

    tokens_per_s: float
    rss_bytes: int


@dataclass(frozen=True)
class Measured:
    """What a process printed and took."""

    output: str
    rss_bytes: int  # at its peak
    cpu_s: float


def measured(command: list[str], num_threads: int = 0) -> Measured:
    """Run a command to its end; RuntimeError with the end of what it said if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if num_threads:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    with tempfile.TemporaryDirectory() as cache:
        environment["HF_DATASETS_CACHE"] = cache
        between = [sys.executable, "-S", str(USAGE), *command]
        done = subprocess.run(between, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    rss_bytes, cpu_s, code = json.loads(done.stderr.splitlines()[-1])
    if code:
        raise RuntimeError(f"{command[:4]} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return Measured(done.stdout, rss_bytes, cpu_s)


def train(spec: TrainSpec, folder: Path, name: str, num_threads: int = 0) -> tuple[list[dict[str, Any]], Measured]:
    """`python -m training` in `folder`, its storage: the steps of the run `runs/NAME`, and what it took."""
    run_dir, spec_file = folder / "runs" / name, folder / f"{name}.json"
    spec_file.write_text(spec.model_dump_json())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(spec.num_workers)]
    command = [sys.executable, *(launcher if spec.num_workers > 1 else []), "-m", "training", str(spec_file)]
    command += ["--run-dir", str(run_dir), "--storage", str(folder)]
    took = measured(command, num_threads)
    items = [json.loads(line) for line in (run_dir / "progress.jsonl").read_text().splitlines()]
    return [item for item in items if item["kind"] == "step"], took


def train_peer(settings: dict[str, Any], script: str = "trl_sft.py") -> tuple[dict[str, Any], int]:
    """A run of the peer with the fields of `Settings` in its script: what that prints last, and peak memory."""
    took = measured([str(PEER), str(PEERS / script), json.dumps(settings)])
    result: dict[str, Any] = json.loads(took.output.splitlines()[-1])
    return result, took.rss_bytes


def tokens_per_s(at: list[float], num_tokens: list[int], num_warmup_steps: int) -> float:
    """Tokens of the steps after the first ones over the time from the end of those to the end of the last."""
    return sum(num_tokens[num_warmup_steps:]) / (at[-1] - at[num_warmup_steps - 1])
