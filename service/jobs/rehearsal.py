"""A run without a model: the same items, wishes, checkpoints and artifact as a real one, in milliseconds.

For trying out clients, dashboards and the orchestrator itself; the folders it writes cannot be served.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from service.jobs.recorder import RunRecorder
from training.artifact import Fingerprint, Manifest, canonical_json, commit, hash_files, read_manifest
from training.progress import (
    ArtifactWritten,
    CheckpointSaved,
    EvalMetrics,
    ProgressItem,
    Sample,
    StepMetrics,
    Stopped,
    Wish,
)
from training.spec import AUTO, TrainSpec
from training.storage import Storage

TOKENS_PER_STEP = 100
WEIGHTS = "weights.json"
_FINGERPRINT = Fingerprint(chat_template="none", tokenizer="none", special_tokens="none", dtype="fp32", adapter="none")


class Rehearsal:
    """A `Fit` of a fixed number of steps. `at_step` is called before each step and may wait or raise."""

    def __init__(
        self,
        storage: Storage,
        num_steps: int = 4,
        checkpoint_interval: int = 2,
        at_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._storage, self._num_steps, self._interval, self._at_step = storage, num_steps, checkpoint_interval, at_step

    def __call__(self, spec: TrainSpec, run_key: str, recorder: RunRecorder) -> None:
        """Go through the motions from the last checkpoint on."""
        _Rehearsed(self._storage, spec, run_key, recorder).go(self._num_steps, self._interval, self._at_step)


class _Rehearsed:
    def __init__(self, storage: Storage, spec: TrainSpec, run_key: str, recorder: RunRecorder) -> None:
        self.storage, self.spec, self.run_key, self.recorder = storage, spec, run_key, recorder
        self.num_said = 0

    def go(self, num_steps: int, interval: int, at_step: Callable[[int], None]) -> None:
        for step in range(self.last_step() + 1, num_steps + 1):
            at_step(step)
            wish = self.say(self.step_metrics(step, num_steps), self.eval_metrics(step), *self.samples(step))
            if wish is Wish.CANCEL:
                self.say(Stopped(**self.stamp(), wish=wish, step=step))
                return
            if wish is Wish.CHECKPOINT_AND_STOP and step < num_steps:
                self.say(self.checkpoint(step), Stopped(**self.stamp(), wish=wish, step=step))
                return
            if step % interval == 0 or step == num_steps:
                self.say(self.checkpoint(step))
        at_step(num_steps + 1)
        key = f"{self.run_key}/artifact"
        manifest_hash = self.write_folder(key, "full" if self.spec.adapter is None else "adapter", num_steps)
        self.say(ArtifactWritten(**self.stamp(), key=key, manifest_hash=manifest_hash, step=num_steps))

    def last_step(self) -> int:
        folder = f"{self.run_key}/checkpoints"
        manifests = [read_manifest(self.storage, f"{folder}/{name}") for name in self.storage.list_names(folder)]
        return max((manifest.step or 0 for manifest in manifests if manifest is not None), default=0)

    def say(self, *items: ProgressItem) -> Wish:
        return self.recorder.report(list(items))

    def stamp(self) -> dict[str, float]:
        self.num_said += 1
        return {"seq": self.num_said - 1, "at": time.time()}

    def step_metrics(self, step: int, num_steps: int) -> StepMetrics:
        return StepMetrics(
            **self.stamp(),
            step=step,
            total_steps=num_steps,
            epoch=step / num_steps,
            train_loss=loss(step),
            train_mean_token_accuracy=1 - 1 / (step + 1),
            learning_rate=1e-3,
            grad_norm=1.0,
            num_trained_tokens=TOKENS_PER_STEP,
            tokens_per_s=1000.0,
        )

    def eval_metrics(self, step: int) -> EvalMetrics:
        accuracy = 1 - 1 / (step + 1)
        valid_loss = 2 * loss(step) * badness(self.spec)
        return EvalMetrics(**self.stamp(), step=step, valid_loss=valid_loss, valid_mean_token_accuracy=accuracy)

    def samples(self, step: int) -> list[Sample]:
        prompts = self.spec.sample_prompts
        return [Sample(**self.stamp(), step=step, prompt=prompt, text=f"Answer {step}") for prompt in prompts]

    def checkpoint(self, step: int) -> CheckpointSaved:
        key = f"{self.run_key}/checkpoints/step-{step:06d}"
        manifest_hash = self.write_folder(key, "checkpoint", step)
        accuracy = 1 - 1 / (step + 1)
        return CheckpointSaved(
            **self.stamp(),
            step=step,
            key=key,
            manifest_hash=manifest_hash,
            train_loss=loss(step),
            train_mean_token_accuracy=accuracy,
        )

    def write_folder(self, key: str, kind: str, step: int) -> str:
        self.storage.write_bytes(f"{key}/{WEIGHTS}", canonical_json({"loss": loss(step)}))
        manifest = Manifest.model_validate(
            {
                "kind": kind,
                "files": hash_files(self.storage, key, [WEIGHTS]),
                "base_id": self.spec.base.id,
                "base_content_hash": self.spec.base.content_hash,
                "fingerprint": _FINGERPRINT,
                "spec": self.spec,
                "step": step,
                "last_step": None if kind == "checkpoint" else step,
            }
        )
        return commit(self.storage, key, manifest)


def badness(spec: TrainSpec) -> float:
    """1 at a learning rate of 0.001, and more with the distance from it: so that a sweep has something to find."""
    rate = spec.hyperparameters.learning_rate
    return 1.0 if rate == AUTO else 1.0 + abs(math.log10(rate / 1e-3))


def loss(step: int) -> float:
    """A loss that falls, the same in every attempt."""
    return 4.0 / (step + 1)
