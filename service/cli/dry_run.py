"""`tunesmith train --dry-run`: what a job would take, as a table, and nothing is created.

The files are uploaded to be counted, and removed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
from rich.markup import escape
from rich.table import Table

from service.cli.client import console, post
from service.cli.jobs import TrainWishes, upload


def show_plan(client: openai.OpenAI, data: Path, validation: Path | None, wishes: TrainWishes) -> None:
    """Upload, ask for the plan, show it, clean up. A job that cannot work ends the command with its error."""
    files: list[str] = []
    try:
        for path in (data, validation):
            if path is not None:
                upload(client, path, note=files.append)
        with console.status("Planning …"):
            body = wishes.body(files[0], files[1] if validation is not None else None)
            plan = post(client, "/fine_tuning/jobs/validate", body)
    finally:
        for file_id in files:
            client.files.delete(file_id)
    shown = Table("what", "how much", title=f"Plan of a job on {plan['model']}", show_header=False)
    for what, value in _rows(plan):
        shown.add_row(what, escape(value))
    console.print(shown)
    for warning in plan["warnings"]:
        console.print(f"[yellow]Warning:[/] {escape(warning)}", soft_wrap=True)
    console.print("Nothing was created. Leave --dry-run out to train.")


def _rows(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    resolved, disk, serving = plan["resolved"], plan["disk"], plan["serving"]
    method: str = resolved["method"]["type"]
    hyper, adapter = resolved["method"][method]["hyperparameters"], resolved["adapter"]
    epochs = f"{hyper['n_epochs']} × "
    yield "examples", f"{plan['num_examples']:,} to train, {plan['num_validation_examples']:,} to validate"
    yield "tokens", f"{plan['num_tokens']:,} ({epochs}{plan['num_tokens_per_epoch']:,})"
    yield "with a loss", f"{plan['num_trained_tokens']:,} ({epochs}{plan['num_trained_tokens_per_epoch']:,})"
    yield "longest example", f"{plan['max_example_tokens']:,} tokens, {hyper['max_length']:,} allowed"
    yield "steps", f"{plan['total_steps']:,} of {hyper['batch_size']} examples"
    yield "learning rate", f"{hyper['learning_rate']:.3g}, {hyper['lr_scheduler']}"
    weights = "all" if adapter["type"] == "none" else f"LoRA of rank {adapter['rank']}, alpha {adapter['alpha']:g}"
    yield "weights", f"{weights}, {resolved['precision']}"
    workers = plan["num_workers"]
    least_to_most = f"{workers['min']} to {workers['max']}" if isinstance(workers, dict) else workers
    yield "memory", f"{size(plan['peak_memory_bytes'])} for each of {least_to_most} worker(s)"
    duration = "unknown" if plan["duration_s"] is None else time_span(plan["duration_s"])
    if isinstance(workers, dict) and plan["duration_s"] is not None:
        duration += f" with {workers['max']} workers"
    yield "time", f"{duration} ({plan['time_basis'].removeprefix('unknown: ')})"
    free = "" if disk["free_bytes"] is None else f", {size(disk['free_bytes'])} free"
    kept = f"{disk['num_kept_checkpoints']} checkpoints of {size(disk['checkpoint_bytes'])}"
    yield "disk", f"{size(disk['total_bytes'])}: {kept}, a model of {size(disk['artifact_bytes'])}{free}"
    yield "served here", f"{'yes' if serving['can_be_served'] else 'no'}: {serving['reason']}"


def size(num_bytes: float) -> str:
    """Decimal units, as disks are sold: 1.2 GB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"


def time_span(seconds: float) -> str:
    """In the unit in which one would say it: 45 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
