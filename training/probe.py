"""How fast this machine trains a base: the real loop, measured on the base's first layers and a few real rows.

A step's time grows linearly with the number of layers, so two depths tell it for all. What is measured is what a run
does: the same loader, batches, attention, loss and optimizer. It works in a process of its own, which takes the
memory of torch with it when it ends.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any, cast

from training.model_shape import LAYER_NAME, ModelShape
from training.progress import ProgressItem, StepMetrics, Wish
from training.spec import TrainSpec
from training.storage import Storage

DEPTHS = (1, 4)  # layers
NUM_STEPS = 4  # the first one is slower and does not count
MAX_TOKENS = 2048  # of a step
MAX_PARAMETERS = 500_000_000  # of the deeper one
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


class ProbeError(Exception):
    """The speed cannot be measured here; the message says why."""


def tokens_per_s(
    spec: TrainSpec, storage: Storage, mean_tokens: float, *, num_threads: int, patience_s: float
) -> float:
    """Tokens, with or without a loss, that one worker with so many threads (0: torch's own choice) trains per second.

    `spec` is resolved, and `mean_tokens` are those of its examples. ProbeError when it fails, or takes longer than
    `patience_s`.
    """
    shape = ModelShape(storage.local_folder(spec.base.key))
    per_layer = shape.num_parameters / shape.num_layers
    if per_layer * DEPTHS[1] > MAX_PARAMETERS:
        raise ProbeError("the base is too large to be tried out while planning")
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        rows = Path(folder) / "rows"
        num_rows = _write_rows(spec, storage, rows, max(1, int(MAX_TOKENS // max(mean_tokens, 1.0))))
        order = {
            "spec": _short(spec, num_rows).model_dump(mode="json"),
            "base": str(shape.folder),
            "folder": folder,
            "num_threads": num_threads,
        }
        found = _measured(order, patience_s)
    few, many = (min(shape.num_layers, depth) for depth in DEPTHS)
    first, last = found["step_s"]
    per_layer_s = max(0.0, last - first) / (many - few) if many > few else 0.0
    return float(found["num_tokens"] / (first + per_layer_s * (shape.num_layers - few)))


def _short(spec: TrainSpec, num_rows: int) -> TrainSpec:
    """A run of a few equal steps, each over all the rows at once, that keeps nothing."""
    changes: dict[str, Any] = {"n_epochs": NUM_STEPS, "batch_size": num_rows, "gradient_accumulation_steps": 1}
    fields: dict[str, Any] = {
        "hyperparameters": spec.hyperparameters.model_copy(update=changes),
        "base": spec.base.model_copy(update={"key": "base"}),
        "training_key": "rows",
        "validation_key": None,
        "validation_split": 0.0,
        "early_stopping": None,
        "start": None,
        "sample_prompts": (),
        "num_workers": 1,
        "min_workers": None,
        "parallel": "data",
        "checkpoint_interval": NUM_STEPS,
    }
    return spec.model_copy(update=fields)


def _write_rows(spec: TrainSpec, storage: Storage, path: Path, num_rows: int) -> int:
    """The first rows of the training file, at most a micro-batch of them; returns how many there are."""
    hyper = spec.hyperparameters
    parts = spec.num_workers * cast(int, hyper.gradient_accumulation_steps)
    num_rows = min(num_rows, -(-cast(int, hyper.batch_size) // parts))
    with storage.open_read(spec.training_key) as file:
        lines = list(islice((line for line in file if line.strip()), num_rows))
    path.write_bytes(b"\n".join(line.strip() for line in lines))
    return len(lines)


def _measured(order: dict[str, Any], patience_s: float) -> dict[str, Any]:
    """Seconds of a step at each depth, and its tokens, from a process of its own."""
    command = [sys.executable, "-m", "training.probe"]
    try:
        done = subprocess.run(
            command, input=json.dumps(order), capture_output=True, text=True, timeout=patience_s, check=True
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(f"a try-out did not end within {patience_s:.0f} seconds") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise ProbeError(f"a try-out failed: {last}") from None
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


# -- in the process of its own -----------------------------------------------------------------------------------------


class _Steps:
    """A channel that keeps the steps, and what the clocks said when they came."""

    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []
        self._clocks: list[tuple[float, float]] = []  # wall and CPU seconds

    def send(self, items: list[ProgressItem]) -> Wish:
        """Never wishes for anything."""
        found = [item for item in items if isinstance(item, StepMetrics)]
        if found:
            self.steps += found
            self._clocks.append((time.perf_counter(), time.process_time()))
        return Wish.GO_ON

    def step_s(self, num_threads: int) -> float:
        """Seconds of a step as far as this process had its CPUs: others that want them now may be gone by then."""
        seconds = [step.num_trained_tokens / step.tokens_per_s for step in self.steps[1:] if step.tokens_per_s]
        if not seconds:
            sys.exit("its rows have no token to learn from")
        (start, cpu_start), (end, cpu_end) = self._clocks[0], self._clocks[-1]
        share = (cpu_end - cpu_start) / (end - start) / num_threads if end > start else 1.0
        return sum(seconds) / len(seconds) * min(1.0, share)


def main() -> None:
    """Reads an order from stdin, prints the steps' figures."""
    import torch

    from training import loop
    from training.examples import load_examples

    order = json.load(sys.stdin)
    if order["num_threads"]:
        torch.set_num_threads(order["num_threads"])
    spec, folder = TrainSpec.model_validate(order["spec"]), Path(order["folder"])
    storage, seconds = Storage(str(folder)), []
    for depth in DEPTHS:
        write_shallow(Path(order["base"]), folder / "base", depth)
        channel = _Steps()
        outcome = loop.run(spec, storage, f"run-{depth}", channel, folder / "scratch")
        if outcome.status != "finished":
            raise ProbeError(outcome.message or outcome.status)
        seconds.append(channel.step_s(torch.get_num_threads()))
    rows, _ = load_examples(spec, storage, folder / "counted")
    print(json.dumps({"step_s": seconds, "num_tokens": sum(len(ids) for ids in rows["input_ids"])}))


def write_shallow(base: Path, folder: Path, depth: int) -> None:
    """A base's folder with its first layers only."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shape = ModelShape(base)
    tensors = {}
    for name in shape.weight_files():
        with safe_open(base / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                layer = LAYER_NAME.search(f".{key}")
                if layer is None or int(layer[1]) < depth:
                    tensors[key] = file.get_tensor(key)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in base.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copy(path, folder / path.name)
    config = {
        key: value[:depth] if isinstance(value, list) and len(value) == shape.num_layers else value
        for key, value in shape.config.items()
    }
    config |= {key: min(depth, shape.num_layers) for key in _LAYER_KEYS if key in config}
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
