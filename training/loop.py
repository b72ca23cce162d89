"""One run, from a resolved spec to an artifact. The same on a laptop, under torchrun and under Ray Train.

The cycle: set up → resume → steps, with evaluations and checkpoints at their intervals → the best checkpoint becomes
the artifact. Rank 0 writes and reports. What a retry would not mend is returned as an outcome; only crashes raise.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch

from training import fsdp
from training.artifact import read_manifest
from training.batches import Batches, Examples, MicroBatch, collate
from training.build import build
from training.checkpoints import Checkpoints, TrainerState
from training.classification_metrics import summary
from training.divergence import LossWatch
from training.evaluation import Evaluation, evaluate
from training.examples import ExamplesError, load_examples
from training.export import Exporter
from training.failure import Failure, check_flag, not_finite
from training.methods import classification, dpo, embedding, supervised
from training.methods.interface import Method
from training.model import stored_dtype
from training.optim import learning_rate
from training.parallel import Workers, agree_on, failure_of
from training.progress import (
    ArtifactWritten,
    Channel,
    CheckpointDeleted,
    CheckpointSaved,
    EvalMetrics,
    Failed,
    Message,
    Sample,
    StepMetrics,
    Stopped,
    Wish,
)
from training.reporter import Reporter
from training.samples import Samples
from training.spec import TrainSpec
from training.start import check_start
from training.storage import Storage
from training.validation_curve import ValidationCurve

METHODS: dict[str, Method] = {
    "supervised": supervised,
    "dpo": dpo,
    "classification": classification,
    "embedding": embedding,
}
WISHES = list(Wish)
# What every step sums over the workers beside the gradients; behind it come the method's own numbers. Loss, correct and
# those are divided by the method's count.
LOSS, CORRECT, COUNT, TOKENS, OUT_OF_MEMORY, WISH = range(6)
NUM_SUMS = 6


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, the same on all ranks."""

    status: Literal["finished", "stopped", "failed"]
    step: int
    wish: Wish | None = None
    code: str | None = None
    message: str | None = None


def run(spec: TrainSpec, storage: Storage, run_key: str, channel: Channel, scratch_dir: Path) -> Outcome:
    """Run, or go on with, the run in the folder `run_key`; every worker of the run calls this."""
    assert spec.unresolved() == [], f"still on auto: {spec.unresolved()}"
    workers = Workers.join()
    with Reporter(channel if workers.rank == 0 else None) as reporter:
        this = _Run(spec, storage, run_key, scratch_dir, workers, reporter)
        try:
            outcome = this.go()
        except (Failure, RuntimeError, MemoryError) as error:
            failure = failure_of(error, workers)
            reporter.say(Failed, code=failure.code, message=failure.message, param=failure.field_of(spec.method))
            outcome = Outcome("failed", this.step, code=failure.code, message=failure.message)
    workers.leave()
    return outcome


class _Run:
    """The state of one run on one worker."""

    def __init__(
        self, spec: TrainSpec, storage: Storage, run_key: str, scratch_dir: Path, workers: Workers, reporter: Reporter
    ) -> None:
        self.spec, self.storage, self.run_key, self.scratch_dir = spec, storage, run_key, scratch_dir
        self.workers, self.reporter = workers, reporter
        self.method = METHODS[spec.method]
        self.loss_sums = partial(self.method.loss_sums, spec)
        self.checkpoints = Checkpoints(storage, run_key, spec)
        self.artifact_key = f"{run_key}/artifact"
        self.step, self.num_trained_tokens = 0, 0
        self.evaluation: tuple[int, Evaluation] | None = None  # the last one and its step
        self.curve, self.watch = ValidationCurve(), LossWatch()

    def go(self) -> Outcome:
        """The whole cycle."""
        artifact = read_manifest(self.storage, self.artifact_key)
        if artifact is not None:
            self._say_known_checkpoints()
            self.step = artifact.last_step or artifact.step or 0
            return self._finish(artifact.hash(), artifact.step or 0)
        agree_on(self.workers, self._set_up)
        self._prepare_examples()
        agree_on(self.workers, self._resume)
        self._say_known_checkpoints()
        if self._agreed_wish() is Wish.CANCEL:
            return self._stop(Wish.CANCEL)
        while not self._is_complete():
            self.step += 1
            wish = self._train_step()
            if wish is Wish.CANCEL:
                return self._stop(wish)
            if self._is_evaluation_due():
                self._evaluate()  # also before a stop: a resumed run must know what an uninterrupted one would
                self._sample()
            stops = wish is Wish.CHECKPOINT_AND_STOP and not self._is_complete()
            if stops or self._is_checkpoint_due():
                self._save_checkpoint()
            if stops:
                return self._stop(wish)
        return self._export()

    def _is_complete(self) -> bool:
        """Whether there is nothing more to train."""
        return self.step == self.batches.total_steps or self.curve.has_lost_patience(self.spec.early_stopping)

    def _is_checkpoint_due(self) -> bool:
        """At intervals, at the end, and whenever an evaluation was the best: that checkpoint may become the model."""
        is_at_interval = self.step % cast(int, self.spec.checkpoint_interval) == 0
        return is_at_interval or self._is_complete() or self.curve.best_step == self.step

    def _set_up(self) -> None:
        """Data, model, optimizer."""
        base_folder = self.storage.local_folder(self.spec.base.key)
        check_start(self.spec, self.storage)
        try:
            found = load_examples(self.spec, self.storage, self.scratch_dir / "examples")
        except ExamplesError as bad:  # planning refuses these rows before
            raise Failure(f"invalid_{bad.param}", f"The {bad.param} cannot be used: {bad}", bad.param) from bad
        self.train_set, self.valid_set = cast(tuple[Examples, Examples | None], found)
        if len(self.train_set) == 0:
            raise Failure("invalid_training_file", "The training file has no example to learn from.", "training_file")
        self.samples = Samples.load(self.spec, self.storage, base_folder)
        start_folder = self.storage.local_folder(self.spec.start.key) if self.spec.start is not None else None
        num_sums = NUM_SUMS + len(self.method.MEANS)
        self.model, self.trainer = build(self.spec, base_folder, start_folder, num_sums, self.workers)
        self.exporter = Exporter(self.spec, base_folder, stored_dtype(base_folder), self.model, self.trainer)

    def _prepare_examples(self) -> None:
        """What the method must know of the start weights, before any others are loaded; then the order of steps."""
        spec, hyper = self.spec, self.spec.hyperparameters
        num_micro_batches = cast(int, hyper.gradient_accumulation_steps)
        parts = max(spec.num_workers, self.workers.size) * num_micro_batches  # also where fewer workers came
        self.micro_batch_size = -(-cast(int, hyper.batch_size) // parts)
        prepared = partial(self.method.prepare, spec, self.model)
        self.train_set = prepared(self.train_set, self.workers, self.micro_batch_size)
        if self.valid_set:
            self.valid_set = prepared(self.valid_set, self.workers, self.micro_batch_size)
        self.batches = Batches(
            self.train_set,
            batch_size=cast(int, hyper.batch_size),
            n_epochs=cast(int, hyper.n_epochs),
            seed=spec.seed,
            num_micro_batches=num_micro_batches,
            rank=self.workers.rank,
            num_workers=self.workers.size,
            num_shares=spec.num_workers,
        )

    def _resume(self) -> None:
        """Go on from the last committed checkpoint, if there is one."""
        state = self.checkpoints.restore(self.exporter)
        if state is not None:
            if state.total_steps != self.batches.total_steps:
                raise Failure("data_changed", "The data changed since the last checkpoint: start a new run.")
            self.step, self.num_trained_tokens = state.step, state.num_trained_tokens
            self.curve, self.watch = state.curve, state.watch
            self.train_loss, self.train_accuracy = state.train_loss, state.train_mean_token_accuracy
            self.reporter.say(Message, text=f"Resumed from the checkpoint of step {state.step}.")

    def _train_step(self) -> Wish:
        """One optimizer step over all workers; returns the wish that they agree on. Failure stops before the update."""
        started = time.perf_counter()
        self.trainer.zero()
        sums = self.trainer.sums
        try:
            for number, (batch, counts) in enumerate(self._micro_batches()):
                self.workers.seed(self.spec.seed, self.step, number)
                found = self.loss_sums(self.model, batch.to(self.workers.device))
                (found.loss * counts).backward()
                if not counts:
                    continue
                sums[LOSS] += found.loss.detach()
                sums[CORRECT] += found.num_correct
                sums[COUNT] += found.num_counted
                sums[TOKENS] += len(batch.targets)
                if found.others is not None:
                    sums[NUM_SUMS:] += found.others
        except (RuntimeError, MemoryError) as error:
            if not fsdp.can_be_told(error, self.model):
                raise
            sums[OUT_OF_MEMORY] += 1
        sums[WISH] += WISHES.index(self.reporter.wish) if self.workers.rank == 0 else 0
        self.trainer.reduce(self.workers)
        *totals, norm = torch.cat([sums, self.trainer.grad_norm()[None]]).tolist()  # the step's only wait for a device
        check_flag(totals[OUT_OF_MEMORY])
        self._update(totals, norm, started)
        return WISHES[round(totals[WISH])]

    def _micro_batches(self) -> Iterable[tuple[MicroBatch, bool]]:
        """This worker's micro-batches of the step, and whether each counts."""
        mine = self.batches.micro_batches(self.step)
        if self.spec.parallel == "fsdp":
            return fsdp.with_idle_passes(mine, collate(self.train_set[[0]]), self.workers)
        return ((batch, True) for batch in mine)

    def _update(self, totals: list[float], norm_sum: float, started: float) -> None:
        """The optimizer step, after looking at what it would do."""
        hyper = self.spec.hyperparameters
        rate, num_tokens = learning_rate(hyper, self.step, self.batches.total_steps), totals[TOKENS]
        count = max(totals[COUNT], 1.0)
        self.train_loss, self.train_accuracy, norm = totals[LOSS] / count, totals[CORRECT] / count, norm_sum / count
        what = f"loss {self.train_loss}, gradient norm {norm}, learning rate {rate:.3g}"
        self._check_finite(self.train_loss + norm, f"{what}; the step was not applied")
        self.watch = self.watch.after(self.train_loss)
        self.watch.check(self.step, self.train_loss, self.checkpoints.committed())
        self.trainer.step(rate, min(1.0, hyper.max_grad_norm / (norm + 1e-6)) / count)
        self.num_trained_tokens += round(num_tokens)
        self.reporter.say(
            StepMetrics,
            step=self.step,
            total_steps=self.batches.total_steps,
            epoch=self.step / self.batches.steps_per_epoch,
            train_loss=self.train_loss,
            train_mean_token_accuracy=self.train_accuracy,
            learning_rate=rate,
            grad_norm=norm,
            num_trained_tokens=round(num_tokens),
            tokens_per_s=num_tokens / (time.perf_counter() - started),
            means={name: x / count for name, x in zip(self.method.MEANS, totals[NUM_SUMS:], strict=True)},
        )

    def _check_finite(self, total: float, what: str) -> None:
        """Stop before weights, or a checkpoint of weights that are useless already, do damage."""
        if total - total != 0:  # true for infinities and for what is not a number
            raise not_finite(self.step, what, self.checkpoints.committed())

    def _is_evaluation_due(self) -> bool:
        """At intervals and after the last step."""
        return self.step == self.batches.total_steps or self.step % cast(int, self.spec.eval_interval) == 0

    def _sample(self) -> None:
        """Show what the weights have learnt; the other workers wait at their next sum."""
        found = self.samples.generate(self.model) if self.workers.rank == 0 else ()
        if found is None:
            self.reporter.say(Message, level="warn", text=f"No memory is left for samples at step {self.step}.")
        for prompt, text in found or ():
            self.reporter.say(Sample, step=self.step, prompt=prompt, text=text)

    def _evaluate(self) -> None:
        """Validate, when there is something to validate on."""
        if not self.valid_set:
            return
        means, labels, size = self.method.MEANS, self.spec.labels(), self.micro_batch_size
        result = evaluate(self.model, self.loss_sums, self.valid_set, self.workers, size, means, labels)
        self._check_finite(result.loss, f"the validation loss is {result.loss}")
        self.evaluation = (self.step, result)
        self.curve = self.curve.after(self.step, result.loss, self.spec.early_stopping)
        self.reporter.say(
            EvalMetrics,
            step=self.step,
            valid_loss=result.loss,
            valid_mean_token_accuracy=result.accuracy,
            means=result.means,
        )
        if warning := self.curve.warning(self.step):
            self.reporter.say(Message, level="warn", text=warning)

    def _save_checkpoint(self) -> None:
        """Checkpoint of exactly this step, then make room."""
        tensors = self.trainer.state()  # sharded weights are gathered from all workers
        if self.workers.rank != 0:
            return
        evaluation = self.evaluation[1] if self.evaluation and self.evaluation[0] == self.step else None
        state = TrainerState(
            step=self.step,
            total_steps=self.batches.total_steps,
            epoch=self.step / self.batches.steps_per_epoch,
            num_trained_tokens=self.num_trained_tokens,
            train_loss=self.train_loss,
            train_mean_token_accuracy=self.train_accuracy,
            valid_loss=evaluation.loss if evaluation else None,
            valid_mean_token_accuracy=evaluation.accuracy if evaluation else None,
            curve=self.curve,
            watch=self.watch,
        )
        report = evaluation.report if evaluation else None
        manifest_hash = self.checkpoints.save(self.exporter, state, tensors, self.scratch_dir, report)
        self._say_checkpoint(state, manifest_hash)
        for step in self.checkpoints.prune():
            self.reporter.say(CheckpointDeleted, step=step, key=self.checkpoints.key(step))

    def _say_known_checkpoints(self) -> None:
        """Repeat what an earlier attempt may have died before saying; the owner stores each checkpoint once."""
        if self.workers.rank == 0:
            for step in self.checkpoints.committed():
                self._say_checkpoint(self.checkpoints.state(step), self.checkpoints.manifest_hash(step))

    def _say_checkpoint(self, state: TrainerState, manifest_hash: str) -> None:
        key = self.checkpoints.key(state.step)
        self.reporter.say(CheckpointSaved, step=state.step, key=key, manifest_hash=manifest_hash, **state.metrics())

    def _export(self) -> Outcome:
        """The best checkpoint becomes the artifact; without a validation set, the last one."""
        if self.workers.rank != 0:
            return Outcome("finished", self.step)
        for text in self.curve.endings(self.step, self.batches.total_steps, self.spec.early_stopping):
            self.reporter.say(Message, text=text)
        step = self.step if self.curve.best_step is None else self.curve.best_step
        if found := self.checkpoints.report(step):
            self.reporter.say(Message, text=summary(found))
        return self._finish(self.checkpoints.promote(step, self.artifact_key, self.step), step)

    def _finish(self, manifest_hash: str, step: int) -> Outcome:
        self.reporter.say(ArtifactWritten, key=self.artifact_key, manifest_hash=manifest_hash, step=step)
        return Outcome("finished", self.step)

    def _stop(self, wish: Wish) -> Outcome:
        self.reporter.say(Stopped, wish=wish, step=self.step)
        return Outcome("stopped", self.step, wish=wish)

    def _agreed_wish(self) -> Wish:
        """Rank 0's wish, known to all."""
        mine = float(WISHES.index(self.reporter.wish)) if self.workers.rank == 0 else 0.0
        return WISHES[round(self.workers.total(mine))]
