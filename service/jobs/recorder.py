"""A run's progress items become rows. The receiving end of `training.progress.Channel`, the same for every launcher.

One transaction per batch, which first proves that the run still counts. Rows are idempotent by job, attempt and item
number, so a batch that is sent again after a lost reply changes nothing.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from service.jobs import endings
from service.jobs.publish import add_model, publish, publish_best
from service.jobs.states import Desired
from service.metrics import Metrics
from service.store import checkpoints, events, jobs, metrics, models, runs
from service.store.database import Database
from service.store.jobs import StateConflict
from service.store.runs import RunLost
from service.store.tables import Job, Run
from training.artifact import Manifest, read_manifest
from training.progress import (
    ArtifactWritten,
    CheckpointDeleted,
    CheckpointSaved,
    EvalMetrics,
    Failed,
    Message,
    ProgressItem,
    Sample,
    StepMetrics,
    Stopped,
    Wish,
)
from training.storage import Storage

log = logging.getLogger(__name__)

MAX_CONFLICTS = 5  # a wish of the user may come between our read and our move; the next try sees it
CURVE_FIELDS = {"epoch", "train_loss", "train_mean_token_accuracy", "learning_rate", "grad_norm", "num_trained_tokens"}
METRIC_FIELDS = {"total_steps", "tokens_per_s"} | CURVE_FIELDS
EVAL_FIELDS = {"valid_loss", "valid_mean_token_accuracy"}


@dataclass
class _Progress:
    """What this attempt has seen so far; only for estimates and for complete event data, never the truth."""

    first: StepMetrics | None = None
    last: StepMetrics | None = None
    manifests: dict[str, Manifest] = field(default_factory=dict)


class RunRecorder:
    """Stores what one run says, and tells it what its owner wants. Safe to call from several threads."""

    def __init__(self, db: Database, storage: Storage, run_id: str, epoch: int, numbers: Metrics | None = None) -> None:
        """`numbers` takes the speed of training, for monitoring."""
        self.run_id = run_id
        self._db, self._storage, self._epoch, self._numbers = db, storage, epoch, numbers
        self._lock = threading.Lock()
        self._progress = _Progress()
        self._stop_asked = threading.Event()
        self.lost = threading.Event()  # the run was ended by somebody else
        self.over = threading.Event()  # the run's ending is stored; nothing that follows changes it

    def report(self, items: list[ProgressItem]) -> Wish:
        """Store a batch in order, return the wish. The workers of a run that no longer counts are told to cancel."""
        with self._lock:
            if self.over.is_set():
                return Wish.GO_ON
            try:
                return self._store(items) if items else self._look()
            except RunLost:
                self.lost.set()
                return Wish.CANCEL

    def heartbeat(self) -> None:
        """Say that the driver lives, however long a step takes. RunLost if the run no longer counts."""
        if self.over.is_set():
            return
        try:
            with self._db.write() as tx:
                runs.hold(tx, self.run_id, self._epoch)
        except RunLost:
            if not self.over.is_set():
                self.lost.set()
                raise

    def ask_stop(self) -> None:
        """Checkpoint and stop at the next step, whatever the owner wants: the platform goes down."""
        self._stop_asked.set()

    def abandon(self) -> None:
        """Refuse everything from now on; for launchers that cannot kill."""
        self.lost.set()

    def forget_missing_checkpoints(self) -> None:
        """Drop the rows of checkpoints that an earlier attempt deleted, and did not live to say so."""
        with self._db.read() as tx:
            keys = [row.storage_key for row in checkpoints.live(tx, runs.get(tx, self.run_id).job_id)]
        missing = [key for key in keys if read_manifest(self._storage, key) is None]
        if missing:
            with self._db.write() as tx:
                job = jobs.by_id(tx, runs.hold(tx, self.run_id, self._epoch).job_id)
                for key in missing:
                    _drop_checkpoints(tx, job, key)

    def publish(self, key: str, manifest_hash: str) -> None:
        """Publish a finished artifact."""
        publish(self._db, self._storage, self.run_id, self._epoch, key, manifest_hash)
        self.over.set()

    def publish_best(self, trial: Job) -> None:
        """Publish the trial's model as that of its sweep, whose run this is."""
        publish_best(self._db, self._storage, self.run_id, self._epoch, trial)
        self.over.set()

    def hold(self, tx: Session) -> Job:
        """The run's job, after a proof that the run still counts; RunLost otherwise."""
        return jobs.by_id(tx, runs.hold(tx, self.run_id, self._epoch).job_id)

    def crashed(self, reason: str, max_attempts: int, *, lacks_memory: bool = False) -> None:
        """The attempt broke down without an ending of its own."""
        with self._lock, self._db.write() as tx:
            run = runs.hold(tx, self.run_id, self._epoch)
            endings.lost(tx, run, reason=reason, max_attempts=max_attempts, lacks_memory=lacks_memory)
        self.over.set()

    def requeue(self) -> None:
        """The attempt found no room for its workers: the job goes back to the queue, which counts the room again."""
        with self._lock, self._db.write() as tx:
            endings.stopped(tx, runs.hold(tx, self.run_id, self._epoch), step=None)
        self.over.set()

    # Items to rows

    def _store(self, items: list[ProgressItem]) -> Wish:
        if self.lost.is_set():
            raise RunLost(f"run {self.run_id} was abandoned")
        artifact = next((item for item in items if isinstance(item, ArtifactWritten)), None)
        self._read_manifests(items)
        for num_conflicts in range(MAX_CONFLICTS):
            try:
                with self._db.write() as tx:
                    run = runs.hold(tx, self.run_id, self._epoch)
                    is_over = self._add_rows(tx, run, items)
                    job = jobs.by_id(tx, run.job_id)
                break
            except StateConflict:
                if num_conflicts == MAX_CONFLICTS - 1:
                    raise
        self._observe(items)
        if is_over:
            self.over.set()
        elif artifact is not None:
            self.publish(artifact.key, artifact.manifest_hash)
        return self._wish(job)

    def _look(self) -> Wish:
        """The wish alone. Asked several times a second, so it writes nothing; heartbeats have a thread."""
        with self._db.read() as tx:
            run = runs.get(tx, self.run_id)
            job = jobs.by_id(tx, run.job_id)
        if self.lost.is_set() or run.state != "active" or run.epoch != self._epoch:
            raise RunLost(f"run {self.run_id} was ended")
        return self._wish(job)

    def _wish(self, job: Job) -> Wish:
        if job.desired == Desired.CANCEL:
            return Wish.CANCEL
        if job.desired == Desired.PAUSE or self._stop_asked.is_set():
            return Wish.CHECKPOINT_AND_STOP
        return Wish.GO_ON

    def _observe(self, items: list[ProgressItem]) -> None:
        if self._numbers is not None:
            for item in items:
                if isinstance(item, StepMetrics):
                    self._numbers.observe_training(item.num_trained_tokens, item.tokens_per_s)

    def _read_manifests(self, items: list[ProgressItem]) -> None:
        """Storage may be slow, so it is read before the transaction."""
        for item in items:
            if isinstance(item, CheckpointSaved) and item.key not in self._progress.manifests:
                manifest = read_manifest(self._storage, item.key)
                if manifest is not None:
                    self._progress.manifests[item.key] = manifest

    def _add_rows(self, tx: Session, run: Run, items: list[ProgressItem]) -> bool:
        """Whether one of the items ended the run."""
        job = jobs.by_id(tx, run.job_id)
        for item in items:
            dedup_key = f"{job.id}:{run.attempt}:{item.seq}"
            match item:
                case Message():
                    events.add(tx, job, item.text, level=item.level, dedup_key=dedup_key, at=item.at)
                case Sample():
                    _add_sample(tx, job, item, dedup_key)
                case StepMetrics():
                    self._add_step(tx, job, run, item, dedup_key)
                case EvalMetrics():
                    self._add_eval(tx, job, run, item, dedup_key)
                case CheckpointSaved():
                    self._add_checkpoint(tx, job, run, item, dedup_key)
                case CheckpointDeleted():
                    _drop_checkpoints(tx, job, item.key)
                case Stopped():
                    return endings.stopped(tx, run, step=item.step)
                case Failed():
                    return endings.failed(tx, run, code=item.code, message=item.message, param=item.param)
        finish_at = self._estimate_finish()
        if finish_at is not None and items:
            jobs.change(tx, job.id, estimated_finish_at=finish_at)
        return False

    def _add_step(self, tx: Session, job: Job, run: Run, item: StepMetrics, dedup_key: str) -> None:
        data, means = item.model_dump(include=METRIC_FIELDS), _named(item.means, "train")
        metrics.add(tx, job.id, run.attempt, "step", item.step, {**data, "means": means}, item.at)
        text = f"Step {item.step}/{item.total_steps}: training loss={item.train_loss:.4f}"
        events.add(
            tx, job, text, type="metrics", data={"step": item.step, **data, **means}, dedup_key=dedup_key, at=item.at
        )
        if run.first_step_at is None:
            runs.set_first_step(tx, run.id, item.at, item.step)
        if self._progress.first is None:
            self._progress.first = item
        self._progress.last = item

    def _estimate_finish(self) -> float | None:
        first, last = self._progress.first, self._progress.last
        if first is None or last is None or last.step <= first.step:
            return None
        step_s = (last.at - first.at) / (last.step - first.step)
        return last.at + step_s * (last.total_steps - last.step)

    def _add_eval(self, tx: Session, job: Job, run: Run, item: EvalMetrics, dedup_key: str) -> None:
        numbers, means = item.model_dump(include=EVAL_FIELDS), _named(item.means, "valid")
        metrics.add(tx, job.id, run.attempt, "eval", item.step, {**numbers, "means": means}, item.at)
        data: dict[str, object] = {"step": item.step, **numbers, **means}
        data |= {f"full_{name}": data[name] for name in EVAL_FIELDS}  # we always evaluate on the whole set
        last, of_total = self._progress.last, ""
        if last is not None and last.step == item.step:
            data |= last.model_dump(include={"total_steps", "train_loss", "train_mean_token_accuracy"})
            of_total = f"/{last.total_steps}"
        text = f"Step {item.step}{of_total}: validation loss={item.valid_loss:.4f}"
        events.add(tx, job, text, type="metrics", data=data, dedup_key=dedup_key, at=item.at)

    def _add_checkpoint(self, tx: Session, job: Job, run: Run, item: CheckpointSaved, dedup_key: str) -> None:
        manifest = self._progress.manifests.get(item.key)
        if manifest is None or manifest.hash() != item.manifest_hash:
            return  # deleted again by the run before we came to it
        if checkpoints.is_recorded(tx, job.id, run.attempt, item.step, item.manifest_hash):
            return
        assert job.plan is not None, "a job without a plan was run"
        model_id = f"{job.plan['model_id']}:ckpt-step-{item.step}"
        if models.by_id(tx, model_id) is not None:
            model_id += f"-{run.attempt}"  # the plain id stands for a folder of an earlier attempt
        _drop_checkpoints(tx, job, item.key)  # the step was trained again and came out differently
        data = item.model_dump(include={"train_loss", "train_mean_token_accuracy", *EVAL_FIELDS}, exclude_none=True)
        checkpoints.add(
            tx,
            job,
            attempt=run.attempt,
            step=item.step,
            storage_key=item.key,
            manifest_hash=item.manifest_hash,
            model_id=model_id,
            metrics={"step": item.step, **data},
        )
        add_model(tx, job, model_id, item.key, manifest, checkpoint=True)
        events.add(tx, job, f"Checkpoint created at step {item.step}", dedup_key=dedup_key, at=item.at)


def _named(means: dict[str, float], of: str) -> dict[str, float]:
    return {f"{of}_{name}": value for name, value in means.items()}


def _add_sample(tx: Session, job: Job, item: Sample, dedup_key: str) -> None:
    """PostgreSQL stores no NUL, and an untrained model may well say one."""
    text = item.text.replace("\0", "\ufffd")
    shown = f"Sample at step {item.step}: {item.prompt} → {text}"
    data = {"step": item.step, "prompt": item.prompt, "text": text}
    events.add(tx, job, shown, data=data, dedup_key=dedup_key, at=item.at)


def _drop_checkpoints(tx: Session, job: Job, key: str) -> None:
    for row in checkpoints.mark_deleted(tx, job.id, key):
        model = models.by_id(tx, row.model_id)
        if model is not None and model.deleted_at is None:
            models.mark_deleted(tx, model)
