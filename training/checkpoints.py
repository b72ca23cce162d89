"""Checkpoints of a run: `<run>/checkpoints/step-000010/`, servable like an artifact and enough to go on to the bit.

No random state is stored: order and dropout of a step are derived from (seed, step, rank).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file

from training.artifact import MANIFEST, REPORT_FILE, commit, read_manifest
from training.divergence import LossWatch
from training.export import OPTIMIZER_FILE, STATE_FILE, Exporter
from training.failure import Failure
from training.spec import Contract, TrainSpec
from training.storage import Storage
from training.validation_curve import ValidationCurve


class TrainerState(Contract):
    """Where a checkpoint stands; the metrics are those of its own step."""

    step: int
    total_steps: int
    epoch: float
    num_trained_tokens: int  # since the start of the job
    train_loss: float
    train_mean_token_accuracy: float
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    curve: ValidationCurve = ValidationCurve()
    watch: LossWatch = LossWatch()

    def metrics(self) -> dict[str, float | None]:
        """The part that a `CheckpointSaved` item repeats."""
        return self.model_dump(
            include={"train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy"}
        )


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run folder."""

    storage: Storage
    run_key: str
    spec: TrainSpec

    def key(self, step: int) -> str:
        """Storage key of a step's checkpoint."""
        return f"{self.run_key}/checkpoints/step-{step:06d}"

    def committed(self) -> list[int]:
        """Steps with a complete checkpoint, ascending. Unfinished folders are not seen."""
        names = self.storage.list_names(f"{self.run_key}/checkpoints")
        steps = [int(name.removeprefix("step-")) for name in names if name.startswith("step-")]
        return sorted(step for step in steps if read_manifest(self.storage, self.key(step)) is not None)

    def manifest_hash(self, step: int) -> str:
        """Hash of a committed checkpoint's manifest."""
        manifest = read_manifest(self.storage, self.key(step))
        assert manifest is not None
        return manifest.hash()

    def state(self, step: int) -> TrainerState:
        """The stored state of a step."""
        return TrainerState.model_validate_json(self.storage.read_bytes(f"{self.key(step)}/{STATE_FILE}"))

    def save(
        self,
        exporter: Exporter,
        state: TrainerState,
        tensors: dict[str, torch.Tensor],
        scratch_dir: Path,
        report: dict[str, Any] | None = None,
    ) -> str:
        """Write and commit the checkpoint of `state.step`, whose trainer gave `tensors`, with the report on its
        evaluation if there is one; returns its manifest's hash."""
        texts = {STATE_FILE: state.model_dump_json(indent=2).encode()}
        if report is not None:
            texts[REPORT_FILE] = json.dumps(report, indent=2, ensure_ascii=False).encode()
        return exporter.commit(
            self.storage,
            self.key(state.step),
            scratch_dir,
            state.step,
            tensors,
            texts,
        )

    def report(self, step: int) -> dict[str, Any] | None:
        """The report that was saved with a step's checkpoint."""
        key = f"{self.key(step)}/{REPORT_FILE}"
        return json.loads(self.storage.read_bytes(key)) if self.storage.exists(key) else None

    def restore(self, exporter: Exporter) -> TrainerState | None:
        """Load the last committed checkpoint into the trainer; None when there is none."""
        steps = self.committed()
        if not steps:
            return None
        manifest = read_manifest(self.storage, self.key(steps[-1]))
        if manifest is None or manifest.spec is None or not manifest.spec.trains_like(self.spec):
            raise Failure("checkpoint_mismatch", "The run folder holds checkpoints of another specification.")
        folder = self.storage.local_folder(self.key(steps[-1]))
        exporter.trainer.load_state(load_file(folder / OPTIMIZER_FILE))
        return self.state(steps[-1])

    def prune(self) -> list[int]:
        """Delete all but `_to_keep`; returns the deleted steps. The manifest goes first, so that no torso counts."""
        states = {step: self.state(step) for step in self.committed()}
        kept = self._to_keep(states)
        old = [step for step in states if step not in kept]
        for step in old:
            self.storage.delete(f"{self.key(step)}/{MANIFEST}")
            self.storage.delete(self.key(step))
        return old

    def _to_keep(self, states: dict[int, TrainerState]) -> set[int]:
        """The newest, the last k, and the best of each of these: whichever a run goes on from, its best is there.

        One written between the intervals, only because it was the best, does not count among the k: a loss that falls
        at every evaluation would push the others out. While the loss is far above its start, the last one from before
        stays: should the run end as diverged, that is the one to go back to.
        """
        newest = max(states)
        lasting = [step for step, state in states.items() if not self._is_passing(state)]
        calm = [step for step, state in states.items() if state.watch.num_above == 0]
        kept = {newest, *lasting[-self.spec.keep_checkpoints :], *calm[-1:]}
        return kept | {best for step in kept if (best := states[step].curve.best_step) is not None}

    def _is_passing(self, state: TrainerState) -> bool:
        """Whether a checkpoint was written only because its evaluation was the best so far."""
        is_due = state.step == state.total_steps or state.step % cast(int, self.spec.checkpoint_interval) == 0
        return state.curve.best_step == state.step and not is_due

    def promote(self, step: int, key: str, last_step: int) -> str:
        """Make the run's artifact of a checkpoint: its servable files, manifest last; returns the manifest's hash."""
        manifest = read_manifest(self.storage, self.key(step))
        assert manifest is not None, f"the checkpoint of step {step} is gone"
        files = {name: entry for name, entry in manifest.files.items() if name not in (OPTIMIZER_FILE, STATE_FILE)}
        self.storage.delete(key)
        for name in files:
            self.storage.copy(f"{self.key(step)}/{name}", f"{key}/{name}")
        kind = "full" if self.spec.adapter is None else "adapter"
        changes = {"kind": kind, "files": files, "last_step": last_step}
        return commit(self.storage, key, manifest.model_copy(update=changes))
