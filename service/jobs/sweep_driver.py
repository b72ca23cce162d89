"""One attempt at a sweep: start its trials, stop the weak ones, publish the best. Runs inside a `RunDriver`.

It holds no truth. A trial is a job, which the orchestrator plans, starts and reaps; its evaluations are rows. A driver
that comes after a killed one reads both, tells what was not told yet and goes on: nothing that is over runs again.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from service.jobs.recorder import RunRecorder
from service.jobs.states import Desired, JobKind, JobState
from service.jobs.sweeps import Sweep, Trial, describe, find_best, request_of_trial, result_of, spec_of_trial
from service.store import events, jobs, metrics
from service.store.database import Database
from service.store.jobs import StateConflict
from service.store.runs import RunLost
from service.store.tables import Job, Metric
from training.progress import Failed, Stopped, Wish
from training.spec import TrainSpec

if TYPE_CHECKING:
    from service.jobs.ray_tune import EarlyStopper

log = logging.getLogger(__name__)

LOOK_S = 0.25  # between two looks at the trials


class SweepDriver:
    """Drives one sweep for as long as its run counts. Its own state is only what it need not read or say again."""

    def __init__(self, db: Database, recorder: RunRecorder, sweep: Job) -> None:
        assert sweep.plan is not None, "a sweep without a plan was run"
        self._db, self._recorder, self._sweep = db, recorder, sweep
        self._settings = Sweep.model_validate(sweep.sweep)
        self._combinations: list[dict[str, float | int]] = sweep.plan["trials"]
        self._early_stopper = _make_early_stopper(self._settings)
        self._seen: set[tuple[str, int]] = set()  # evaluations, by trial and step
        self._results: dict[str, Trial] = {}  # by trial
        self._unsaved: set[str] = set()  # trials whose result is newer than their row
        self._weak: dict[str, int] = {}  # trials to be stopped, and the step that showed it
        self._told: set[str] = set()  # trials whose end is in the sweep's events

    def work(self) -> None:
        """Return when the run has its ending; RunLost if somebody else gave it one."""
        while True:
            try:
                if self._look():
                    return
            except StateConflict as conflict:  # a user's wish came in between; the next look sees it
                log.info("%s", conflict)
            time.sleep(LOOK_S)

    def _look(self) -> bool:
        """One round; whether the run is over."""
        wish = self._recorder.report([])
        if self._recorder.lost.is_set():
            raise RunLost(f"run {self._recorder.run_id} was ended")
        with self._db.read() as tx:
            trials = jobs.trials(tx, self._sweep)
            evaluations = metrics.evaluations(tx, [trial.id for trial in trials if trial.id not in self._told])
        self._take_new(trials, evaluations)
        self._record(trials)
        if wish is not Wish.GO_ON:
            return self._stop(trials, wish)
        if len(trials) == len(self._combinations) and all(_is_over(trial) for trial in trials):
            self._finish()
            return True
        self._start_some(trials)
        return False

    # What the trials did

    def _take_new(self, trials: list[Job], evaluations: list[Metric]) -> None:
        """Take in the evaluations that are new, in their order."""
        by_id = {trial.id: trial for trial in trials}
        for row in evaluations:
            if (row.job_id, row.step) in self._seen:
                continue
            self._seen.add((row.job_id, row.step))
            trial, valid_loss = by_id[row.job_id], float(row.data["valid_loss"])
            result = self._result(trial)
            if result.valid_loss is None or valid_loss < result.valid_loss:
                self._set_result(trial, valid_loss=valid_loss, step=row.step)
            if self._is_weak(trial, row.step, valid_loss):
                self._weak.setdefault(trial.id, row.step)

    def _is_weak(self, trial: Job, step: int, valid_loss: float) -> bool:
        if self._early_stopper is None:
            return False
        assert trial.plan is not None, "a job without a plan was run"
        total_steps = int(trial.plan["total_steps"])
        weak = self._early_stopper.is_weak(_number(trial), self._share(trial, step / total_steps), valid_loss)
        return weak and step < total_steps and not _is_over(trial)  # at the end there is nothing left to save

    def _share(self, trial: Job, progress: float) -> float:
        """Progress in parts of the longest trial: trials are compared after the same number of examples."""
        longest = max(combination.get("n_epochs", 1) for combination in self._combinations)
        return progress * result_of(trial).parameters.get("n_epochs", 1) / longest

    def _result(self, trial: Job) -> Trial:
        return self._results.setdefault(trial.id, result_of(trial))

    def _set_result(self, trial: Job, **changes: Any) -> None:
        self._results[trial.id] = self._result(trial).model_copy(update=changes)
        self._unsaved.add(trial.id)

    def _record(self, trials: list[Job]) -> None:
        """Store what is new in one transaction; what it could not store is still new at the next look."""
        over = [trial for trial in trials if _is_over(trial) and trial.id not in self._told]
        weak = [trial for trial in trials if trial.id in self._weak and _may_stop(trial)]
        if not (self._unsaved or over or weak):
            return
        with self._db.write() as tx:
            sweep = self._recorder.hold(tx)
            for trial in weak:
                self._stop_early(tx, sweep, trial)
            for job_id in self._unsaved:
                jobs.change(tx, job_id, trial=self._results[job_id].model_dump())
            for trial in over:
                self._tell(tx, sweep, trial)
        self._told |= {trial.id for trial in over}
        self._unsaved.clear()

    def _stop_early(self, tx: Session, sweep: Job, trial: Job) -> None:
        if not _may_stop(jobs.by_id(tx, trial.id)):  # it came to its end meanwhile
            return
        step = self._weak[trial.id]
        self._set_result(trial, stopped_early_at_step=step)
        events.add(tx, trial, f"Stopped early after the evaluation of step {step}: other trials are better")
        jobs.request_cancel(tx, trial.project_id, trial.id)
        self._add_event(
            tx, sweep, trial, f"stopped early at step {step}: {_in_short(self._result(trial))}", status="stopped_early"
        )

    def _tell(self, tx: Session, sweep: Job, trial: Job) -> None:
        """The end of a trial in the sweep's events."""
        result = self._result(trial)
        state = JobState(trial.state)
        if state == JobState.SUCCEEDED:
            self._add_event(tx, sweep, trial, f"finished: {_in_short(result)}", status="finished")
        elif state == JobState.FAILED:
            text = f"failed: {(trial.error or {}).get('message')} ({describe(result.parameters)})"
            self._add_event(tx, sweep, trial, text, status="failed", level="warn")
        elif result.stopped_early_at_step is None:
            self._add_event(tx, sweep, trial, f"was cancelled: {describe(result.parameters)}", status="cancelled")

    def _add_event(self, tx: Session, sweep: Job, trial: Job, text: str, *, status: str, level: str = "info") -> None:
        data: dict[str, Any] = {
            "trial": trial.trial_number,
            "num_trials": len(self._combinations),
            "job_id": trial.id,
            "status": status,
            **self._result(trial).model_dump(),
        }
        message = f"Trial {trial.trial_number} of {len(self._combinations)} {text}"
        dedup_key = f"{sweep.id}:trial-{trial.trial_number}-{status}"
        events.add(tx, sweep, message, level=level, data=data, dedup_key=dedup_key)

    # What the sweep does

    def _start_some(self, trials: list[Job]) -> None:
        """Create the next trials, as many as may be open; the orchestrator takes it from there."""
        started = {_number(trial) for trial in trials}
        due = [number for number in range(1, len(self._combinations) + 1) if number not in started]
        num_free = self._settings.max_concurrent - sum(not _is_over(trial) for trial in trials)
        if not due or num_free <= 0:
            return
        with self._db.write() as tx:
            sweep = self._recorder.hold(tx)
            if sweep.desired == Desired.RUN:
                for number in due[:num_free]:
                    self._start(tx, sweep, number)

    def _start(self, tx: Session, sweep: Job, number: int) -> None:
        parameters = self._combinations[number - 1]
        trial = jobs.create(
            tx,
            kind=JobKind.FINE_TUNING,
            project_id=sweep.project_id,
            created_by=sweep.created_by,
            method=sweep.method,
            parent_job_id=sweep.id,
            trial_number=number,
            trial=Trial(parameters=parameters).model_dump(),
            priority=sweep.priority,
            base_id=sweep.base_id,
            parent_model_id=sweep.parent_model_id,
            training_file_id=sweep.training_file_id,
            validation_file_id=sweep.validation_file_id,
            suffix=sweep.suffix,
            request=request_of_trial(sweep, parameters),
            request_hash="",  # nobody sent it, and no retried create may find this job
            spec=spec_of_trial(TrainSpec.model_validate(sweep.spec), parameters).model_dump(mode="json"),
            user_metadata=sweep.user_metadata,
        )
        where = f"{number} of {len(self._combinations)}"
        events.add(tx, trial, f"Created as trial {where} of the sweep {sweep.id}: {describe(parameters)}")
        self._add_event(tx, sweep, trial, f"created: {describe(parameters)} ({trial.id})", status="created")

    def _stop(self, trials: list[Job], wish: Wish) -> bool:
        """Stop once no trial works any more; whether that is so."""
        with self._db.write() as tx:
            sweep = self._recorder.hold(tx)
            if sweep.desired != Desired.RUN:  # else the platform goes down, and stops the trials' runs itself
                jobs.pass_wish_on(tx, sweep, Desired(sweep.desired))  # to one created at the moment of the wish
        if any(JobState(trial.state).has_live_run for trial in trials):
            return False
        self._recorder.report([Stopped(seq=0, at=time.time(), wish=wish, step=0)])
        return True

    def _finish(self) -> None:
        """All trials are over: the best one's model becomes the sweep's."""
        with self._db.read() as tx:
            trials = jobs.trials(tx, self._sweep)
        best = find_best(trials)
        if best is None:
            self._recorder.report([_no_model(trials)])
            return
        with self._db.write() as tx:
            sweep = self._recorder.hold(tx)
            self._add_event(tx, sweep, best, f"is the best: {_in_short(result_of(best))}", status="best")
        self._recorder.publish_best(best)


def _make_early_stopper(sweep: Sweep) -> EarlyStopper | None:
    if sweep.scheduler is None:
        return None
    from service.jobs import ray_tune  # seconds to import, and only needed here

    return ray_tune.EarlyStopper()


def _no_model(trials: list[Job]) -> Failed:
    """Why no trial came to a model: what the first failure says, if there is one."""
    error = next((trial.error for trial in trials if trial.error is not None), None)
    text = "No trial came to a model"
    if error is None:
        return Failed(seq=0, at=time.time(), code="no_trial_succeeded", message=f"{text}: all were cancelled.")
    message = f"{text}. The first failure: {error['message']}"
    return Failed(seq=0, at=time.time(), code=error["code"], message=message, param=error.get("param"))


def _in_short(result: Trial) -> str:
    loss = "no evaluation" if result.valid_loss is None else f"valid_loss {result.valid_loss:.4g}"
    return f"{loss}, {describe(result.parameters)}"


def _may_stop(trial: Job) -> bool:
    return not _is_over(trial) and trial.desired != Desired.CANCEL


def _is_over(trial: Job) -> bool:
    return JobState(trial.state).is_terminal


def _number(trial: Job) -> int:
    assert trial.trial_number is not None, f"job {trial.id} is no trial"
    return trial.trial_number
