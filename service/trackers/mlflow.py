"""MLflow, for every job, by `TUNESMITH_MLFLOW_TRACKING_URI`.

A job's run is found by its tag, so that a later attempt goes on with it. MLflow keeps every value that it is sent, so
steps that the run has already are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from service.jobs.states import JobState
from service.logs import redact
from service.store.tables import Job, Metric
from service.trackers.tracker import numbers, outcome_of, settings_of

EXPERIMENT = "tunesmith"
JOB_TAG = "tunesmith.job_id"
MAX_RETRIES = 1  # of the library for each request; whoever uses a tracker tries again itself
STATUS = {JobState.SUCCEEDED: "FINISHED", JobState.FAILED: "FAILED", JobState.CANCELLED: "KILLED"}
GOES_ON_LATER = "SCHEDULED"


class MlflowTracker:
    """One job's MLflow run."""

    key, name = "mlflow", "MLflow"

    def __init__(self, tracking_uri: str) -> None:
        self._uri = tracking_uri
        self._client: Any = None
        self._run_id = ""
        self._last_steps: dict[str, int] = {}  # by metric: what the run has already

    def open(self, job: Job) -> str | None:
        """Make or find the run; the URL of its page if the tracking server has pages."""
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES

        MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(MAX_RETRIES)
        self._client = MlflowClient(tracking_uri=self._uri)
        experiment_id = self._experiment_id()
        found = self._client.search_runs([experiment_id], filter_string=f"tags.`{JOB_TAG}` = '{job.id}'", max_results=1)
        if found:
            self._continue(found[0])
        else:
            tags = {JOB_TAG: job.id, "tunesmith.base": job.base_id}
            self._run_id = self._client.create_run(experiment_id, run_name=job.id, tags=tags).info.run_id
        params = [Param(name, str(value)) for name, value in settings_of(job).items()]
        self._client.log_batch(self._run_id, params=params)  # nothing happens if they are there
        if not self._uri.startswith("http"):
            return None
        return redact(f"{self._uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{self._run_id}")

    def log(self, rows: Sequence[Metric]) -> None:
        """All in one request, which stores all or nothing."""
        from mlflow.entities import Metric as Value

        values = [
            Value(name, value, round(row.at * 1000), row.step)
            for row in rows
            for name, value in numbers(row).items()
            if row.step > self._last_steps.get(name, -1)
        ]
        if values:
            self._client.log_batch(self._run_id, metrics=values)

    def close(self, job: Job) -> None:
        """The job's state as MLflow's nearest."""
        for name, value in outcome_of(job).items():
            self._client.set_tag(self._run_id, f"tunesmith.{name}", value)
        state = JobState(job.state)
        if state.is_terminal:
            self._client.set_terminated(self._run_id, STATUS[state])
        else:
            self._client.update_run(self._run_id, status=GOES_ON_LATER)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        if self._client.get_experiment_by_name(EXPERIMENT) is None:
            with suppress(MlflowException):  # another job made it in between, or the next line says what is wrong
                self._client.create_experiment(EXPERIMENT)
        return str(self._client.get_experiment_by_name(EXPERIMENT).experiment_id)

    def _continue(self, run: Any) -> None:
        self._run_id = run.info.run_id
        self._client.update_run(self._run_id, status="RUNNING")
        for name in run.data.metrics:
            history = self._client.get_metric_history(self._run_id, name)
            self._last_steps[name] = max(value.step for value in history)
