"""A run that goes on from an earlier fine-tune: its weights must be there, and be of the same base. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.artifact import read_manifest
from training.failure import Failure

if TYPE_CHECKING:
    from training.spec import TrainSpec
    from training.storage import Storage


def check_start(spec: TrainSpec, storage: Storage) -> None:
    """Failure if the folder that the run starts from is gone, or is not the one that was recorded."""
    if spec.start is None:
        return
    manifest = read_manifest(storage, spec.start.key)
    if manifest is None or manifest.hash() != spec.start.manifest_hash:
        text = f"The weights of '{spec.start.model_id}', from which this job starts, are no longer in storage."
        raise Failure("start_model_missing", text, "model")
    if manifest.base_content_hash != spec.base.content_hash:
        text = f"'{spec.start.model_id}' was trained on other weights than those of the base '{spec.base.id}'."
        raise Failure("start_model_mismatch", text, "model")
