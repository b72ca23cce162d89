"""Checkpoints of a run: `<run>/checkpoints/step-000010/`, servable like an artifact and enough to go on to the bit.

No random state is stored: order and dropout of a step are derived from (seed, step, rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from training.artifact import MANIFEST, read_manifest
from training.export import OPTIMIZER_FILE, STATE_FILE, Exporter
from training.failure import Failure
from training.spec import Contract, TrainSpec
from training.storage import Storage


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

    def save(self, exporter: Exporter, state: TrainerState, scratch_dir: Path) -> str:
        """Write and commit the checkpoint of `state.step`; returns its manifest's hash."""
        return exporter.commit(
            self.storage,
            self.key(state.step),
            scratch_dir,
            "checkpoint",
            state.step,
            exporter.trainer.state(),
            state.model_dump_json(indent=2).encode(),
        )

    def restore(self, exporter: Exporter) -> TrainerState | None:
        """Load the last committed checkpoint into the trainer; None when there is none."""
        steps = self.committed()
        if not steps:
            return None
        manifest = read_manifest(self.storage, self.key(steps[-1]))
        if manifest is None or manifest.spec != self.spec:
            raise Failure("checkpoint_mismatch", "The run folder holds checkpoints of another specification.")
        folder = self.storage.local_folder(self.key(steps[-1]))
        exporter.trainer.load_state(load_file(folder / OPTIMIZER_FILE))
        return self.state(steps[-1])

    def prune(self) -> list[int]:
        """Delete all but the last k; returns the deleted steps. The manifest goes first, so that no torso counts."""
        old = self.committed()[: -self.spec.keep_checkpoints]
        for step in old:
            self.storage.delete(f"{self.key(step)}/{MANIFEST}")
            self.storage.delete(self.key(step))
        return old
