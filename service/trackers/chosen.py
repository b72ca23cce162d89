"""Which trackers a job has: those that it asks for, and those that the settings switch on for every job."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from service.settings import Settings
from service.store.tables import Job
from service.trackers.mlflow import MlflowTracker
from service.trackers.tensorboard import TensorboardTracker
from service.trackers.tracker import Tracker
from service.trackers.wandb import WandbTracker


def trackers_of(job: Job, settings: Settings) -> list[Tracker]:
    """None of them opened yet."""
    found: list[Tracker] = [WandbTracker(settings, asked["wandb"]) for asked in job.request.get("integrations") or ()]
    if settings.mlflow_tracking_uri:
        found.append(MlflowTracker(settings.mlflow_tracking_uri))
    if settings.tensorboard_dir:
        found.append(TensorboardTracker(Path(settings.tensorboard_dir)))
    return found


def why_no_wandb(settings: Settings) -> str | None:
    """What is missing before a job may ask for Weights & Biases; None if nothing is."""
    if find_spec("wandb") is None:
        return "Its library is not installed here: install 'tunesmith[wandb]'."
    if not settings.wandb_api_key and not settings.wandb_offline:
        return "This service has no key for it: set TUNESMITH_WANDB_API_KEY (or TUNESMITH_WANDB_OFFLINE=true)."
    return None


def missing_extras(settings: Settings) -> list[str]:
    """What the settings switch on for every job and is not installed, each as a sentence."""
    wanted = {
        "mlflow": ("TUNESMITH_MLFLOW_TRACKING_URI", bool(settings.mlflow_tracking_uri)),
        "tensorboard": ("TUNESMITH_TENSORBOARD_DIR", bool(settings.tensorboard_dir)),
    }
    return [
        f"{variable} is set, but its library is not installed: install 'tunesmith[{extra}]'."
        for extra, (variable, is_on) in wanted.items()
        if is_on and find_spec(extra) is None
    ]
