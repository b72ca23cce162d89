"""The request that a job should have been, after a run that found too little memory. Pure: no SQL, no torch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import ceil
from typing import Any, cast

from service.store.tables import Job
from training.spec import TrainSpec


@dataclass(frozen=True)
class Correction:
    """A whole body of a create, and how it differs from the job's own."""

    request: dict[str, Any]
    change: str


def for_less_memory(job: Job) -> Correction | None:
    """What needs less memory and changes least, in this order: smaller micro-batches, which train the same (but for the
    fewer negatives of an embedding); LoRA; bf16.
    None when all of that was tried: then only shorter rows or larger machines help."""
    spec = TrainSpec.model_validate(job.spec)
    if spec.unresolved():
        return None
    request = {name: copy.deepcopy(value) for name, value in job.request.items() if not name.startswith("_")}
    hyper = spec.hyperparameters
    num_parts, batch_size = cast(int, hyper.gradient_accumulation_steps), cast(int, hyper.batch_size)
    per_worker = ceil(batch_size / spec.num_workers)
    most_parts = per_worker // 2 if spec.method == "embedding" else per_worker  # an example needs another as negative
    if num_parts < most_parts:
        more = min(2 * num_parts, most_parts)
        hyperparameters_of(request, job.method)["gradient_accumulation_steps"] = more
        return Correction(request, f"gradient_accumulation_steps {more} instead of {num_parts}")
    if spec.adapter is None and spec.start is None:
        request["adapter"] = {"type": "lora"}
        return Correction(request, "a LoRA adapter instead of all weights")
    if spec.precision == "fp32":
        request["precision"] = "bf16"
        return Correction(request, "precision bf16 instead of fp32")
    return None


def hyperparameters_of(request: dict[str, Any], method: str) -> dict[str, Any]:
    """Those of the method in a request, which may have left any part out or sent null."""
    settings = request["method"] = request.get("method") or {"type": method}
    own = settings[method] = settings.get(method) or {}
    own["hyperparameters"] = own.get("hyperparameters") or {}
    return cast(dict[str, Any], own["hyperparameters"])
