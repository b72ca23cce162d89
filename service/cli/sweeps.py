"""The sweep of `tunesmith train --sweep …`: options to the request's field, and trials to a table."""

from __future__ import annotations

import math
from typing import Any

from rich.markup import escape

from service.cli.registry import show, table

OVER = {"finished", "failed", "cancelled", "stopped_early"}  # what a trial's event says of one that is not awaited


class SweepOptionError(ValueError):
    """An option that is not of the form that its message shows."""


def sweep_field(given: list[str], num_trials: int | None, asha: bool, max_concurrent: int | None) -> dict[str, Any]:
    """The request's `sweep`: a grid over lists, or with `num_trials` that many random combinations."""
    field: dict[str, Any] = {
        "search": "grid" if num_trials is None else "random",
        "parameters": dict(_parameter(option) for option in given),
    }
    if asha:
        field["scheduler"] = "asha"
    extra = {"num_trials": num_trials, "max_concurrent": max_concurrent}
    return field | {name: value for name, value in extra.items() if value is not None}


def _parameter(option: str) -> tuple[str, Any]:
    name, _, values = option.partition("=")
    try:
        if ".." in values:
            least, _, most = values.partition("..")
            return name, {"min": _number(least), "max": _number(most), "log": name == "learning_rate"}
        return name, [_number(value) for value in values.split(",")]
    except ValueError:
        raise SweepOptionError(
            f"'{option}': write NAME=VALUE,VALUE or, with --trials, NAME=LEAST..MOST, of finite numbers."
        ) from None


def _number(text: str) -> int | float:
    """ValueError if it is no finite number."""
    try:
        return int(text)
    except ValueError:
        if math.isfinite(number := float(text)):
            return number
        raise


def show_trials(sweep: dict[str, Any]) -> None:
    """Every combination with how it does; the best one is marked."""
    if not sweep["trials"]:
        return
    names = list(sweep["trials"][0]["parameters"])
    shown = table("", "trial", *names, "valid_loss", "step", "status", "id")
    for trial in sweep["trials"]:
        early = trial["stopped_early_at_step"]
        loss = trial["valid_loss"]
        shown.add_row(
            "*" if trial["number"] == sweep["best_trial"] else "",
            str(trial["number"]),
            *(f"{trial['parameters'][name]:g}" for name in names),
            "–" if loss is None else f"{loss:.4f}",
            str(trial["step"] or "–"),
            f"stopped early at step {early}" if early else str(trial["status"] or "–"),
            escape(trial["job_id"] or "–"),
        )
    show(shown, "")
