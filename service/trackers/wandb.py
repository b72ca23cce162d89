"""Weights & Biases, for jobs that ask for it in `integrations`.

The run's id is the job's, so that a later attempt goes on with it. Steps are W&B's own, which only ever grow: what an
earlier attempt sent is not sent again. Offline, a run is a folder that `wandb sync` sends; it is written anew by each
attempt, whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from service.jobs.states import JobState
from service.logs import never_show
from service.settings import Settings
from service.store.tables import Job, Metric
from service.trackers.tracker import numbers, outcome_of, settings_of

INIT_TIMEOUT_S = 15.0
FINISH_TIMEOUT_S = 15.0
MAX_TAG = 64  # characters


class WandbTracker:
    """One job's W&B run."""

    key, name = "wandb", "Weights & Biases"

    def __init__(self, settings: Settings, chosen: Mapping[str, Any]) -> None:
        """`chosen` is the integration's `wandb` object as it was sent."""
        self._settings, self._chosen = settings, chosen
        self._run: Any = None
        never_show(_api_key(settings))

    def open(self, job: Job) -> str | None:
        """Make or continue the run; the URL of its page, None offline."""
        import wandb

        self._folder = self._settings.home_dir / "wandb" / job.id
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        try:
            self._run = wandb.init(
                project=self._chosen["project"],
                entity=self._chosen.get("entity"),
                name=self._chosen.get("name") or job.id,
                tags=self._tags(job),
                id=job.id,
                resume="allow",
                dir=str(self._folder),
                config=settings_of(job),
                settings=self._library_settings(),
            )
        except Exception:
            # Its helper process holds the id of a run that it could not begin, and would refuse the next try. The runs
            # of other jobs of this process, if there are any, fail with it and are opened anew.
            wandb.teardown(exit_code=1)
            raise
        return None if self._settings.wandb_offline else self._run.url

    def log(self, rows: Sequence[Metric]) -> None:
        """A training and an evaluation row of one step become one of W&B's."""
        for row in rows:
            if row.step >= self._run.starting_step:
                self._run.log(numbers(row), step=row.step)

    def close(self, job: Job) -> None:
        """A run whose job goes on later is marked as preempted. TimeoutError if the rest cannot be sent in time."""
        self._run.summary.update(outcome_of(job))
        if not JobState(job.state).is_terminal:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if job.state == JobState.SUCCEEDED else 1)
        if self._settings.wandb_offline:
            import wandb

            # `finish` leaves the last records to a helper process, which dies with this one: wait until it is done.
            wandb.teardown()
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _tags(self, job: Job) -> list[str]:
        """The user's and, as OpenAI adds its own, those that find all our runs, the base's and the job's."""
        ours = ("tunesmith/finetune", f"tunesmith/{job.base_id}"[:MAX_TAG], f"tunesmith/{job.id}")
        return list(dict.fromkeys([*(self._chosen.get("tags") or ()), *ours]))

    def _library_settings(self) -> Any:
        """The key goes by value, never into the environment; of this machine nothing is measured or told."""
        import wandb

        return wandb.Settings(
            mode="offline" if self._settings.wandb_offline else "online",
            api_key=_api_key(self._settings) or None,
            base_url=self._settings.wandb_base_url,
            reinit="create_new",  # other jobs of this process have their own
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            stop_fn=lambda: None,  # the button on W&B's page would interrupt this process; jobs are stopped here
            silent=True,
            console="off",
            host="tunesmith",
            program="tunesmith",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )


def _api_key(settings: Settings) -> str:
    return settings.wandb_api_key.get_secret_value() if settings.wandb_api_key else ""
