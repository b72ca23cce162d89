"""Ray Tune for sweeps: the combinations of a search, and ASHA's verdict on a trial. The only file that knows Ray Tune.

Tune's search space and scheduler are used as a library, its `Tuner` is not. A Tuner keeps the truth about trials in an
experiment folder of its own and restores from there; ours is in SQL, written by whoever runs a trial, and must hold
when any process dies at any time: two truths would have to be reconciled after every crash. A Tuner would also put an
actor (a process, a placement group) around each trial, whose only work were to wait for the driver and the train
workers that a job has anyway. As a library, Tune needs no cluster, so that the same code serves in-process launchers.

What is used is public API: the domains and `generate_variants`, which is what Tune's default searcher
`BasicVariantGenerator` draws from, and `ASHAScheduler`'s `on_trial_add` and `on_trial_result`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.variant_generator import generate_variants

from service.jobs.sweeps import Range, Sweep

REDUCTION: Final = 3  # the factor eta of successive halving: at each rung about the best third goes on
RUNGS: Final = 2  # at 1/9 and 1/3 of the longest trial; a rung at its end would save nothing
DIGITS: Final = 4  # of a learning rate drawn from a range: what is shown is exactly what is trained
MAX_DRAWS_PER_TRIAL: Final = 100


def draw_combinations(sweep: Sweep, seed: int) -> list[dict[str, float | int]]:
    """The parameters of each trial, all different; the same for the same sweep and seed.

    A random search stops short of `num_trials` where chance finds no more: in a range that is nearly a point.
    """
    given = sweep.parameters.given()
    space = {"config": {name: _domain(values, sweep.search) for name, values in given.items()}}
    random = np.random.RandomState(seed)
    if sweep.search == "grid":
        return [_plain(spec["config"], given) for _, spec in generate_variants(space, random_state=random)]
    num_wanted = sweep.num_trials or 0
    found: dict[tuple[float | int, ...], dict[str, float | int]] = {}
    for _ in range(num_wanted * MAX_DRAWS_PER_TRIAL):
        for _, spec in generate_variants(space, random_state=random):
            drawn = _plain(spec["config"], given)
            found.setdefault(tuple(drawn.values()), drawn)
        if len(found) == num_wanted:
            break
    return list(found.values())


def _domain(values: list[Any] | Range[Any], search: str) -> Any:
    if not isinstance(values, Range):
        return tune.grid_search(values) if search == "grid" else tune.choice(values)
    if isinstance(values.min, int):
        return (tune.lograndint if values.log else tune.randint)(values.min, values.max + 1)  # Tune leaves the end out
    return (tune.loguniform if values.log else tune.uniform)(values.min, values.max)


def _plain(drawn: dict[str, Any], given: dict[str, list[Any] | Range[Any]]) -> dict[str, float | int]:
    """In the order in which they were given, and Python's own numbers, for JSON."""
    return {name: _number(drawn[name], values) for name, values in given.items()}


def _number(value: Any, values: list[Any] | Range[Any]) -> float | int:
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(values, Range):
        return min(max(float(f"{value:.{DIGITS}g}"), values.min), values.max)
    return float(value)


class EarlyStopper:
    """Asynchronous successive halving (ASHA; Li et al. 2018, arXiv:1810.05934) over the trials of one sweep.

    A trial's first evaluation at or after a rung is compared with what the trials before it had there; it is weak
    unless it is among the best third. The first at a rung always goes on. The state is nothing but the evaluations in
    their order, so that a new driver rebuilds it from the rows.
    """

    def __init__(self) -> None:
        self._scheduler = ASHAScheduler(
            time_attr="share",
            metric="valid_loss",
            mode="min",
            max_t=1,
            grace_period=REDUCTION**-RUNGS,  # type: ignore[arg-type]  # Tune's hint says int, its arithmetic is on floats
            reduction_factor=REDUCTION,
            stop_last_trials=False,  # with True, a late result also counts at earlier rungs
        )
        self._trials: dict[int, Trial] = {}

    def is_weak(self, number: int, share: float, valid_loss: float) -> bool:
        """Whether the trial should stop after this evaluation; `share` is the part of the longest trial that it did."""
        if number not in self._trials:
            self._trials[number] = Trial("trial", stub=True, trial_id=str(number))
            self._scheduler.on_trial_add(None, self._trials[number])  # type: ignore[arg-type]
        result = {"share": share, "valid_loss": valid_loss}
        verdict = self._scheduler.on_trial_result(None, self._trials[number], result)  # type: ignore[arg-type]
        return bool(verdict == TrialScheduler.STOP)
