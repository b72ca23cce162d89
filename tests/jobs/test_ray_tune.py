"""Ray Tune as a library: which combinations a search has, and which trials ASHA calls weak."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from service.jobs.ray_tune import EarlyStopper, draw_combinations
from service.jobs.sweeps import Sweep


def sweep(**fields: Any) -> Sweep:
    return Sweep.model_validate(fields)


def test_a_grid_holds_every_combination_once_in_the_given_numbers() -> None:
    found = draw_combinations(sweep(parameters={"learning_rate": [1.23456e-4, 3e-4], "lora_rank": [8, 16]}), seed=0)
    assert len(found) == 4
    assert {(row["learning_rate"], row["lora_rank"]) for row in found} == {
        (1.23456e-4, 8),
        (1.23456e-4, 16),
        (3e-4, 8),
        (3e-4, 16),
    }
    assert all(type(row["lora_rank"]) is int for row in found)


def test_a_random_search_draws_different_combinations_within_the_ranges_the_same_for_a_seed() -> None:
    asked = sweep(
        search="random",
        num_trials=20,
        parameters={
            "learning_rate": {"min": 1e-5, "max": 1e-3, "log": True},
            "n_epochs": {"min": 1, "max": 3},
            "batch_size": [4, 8],
        },
    )
    found = draw_combinations(asked, seed=7)
    assert found == draw_combinations(asked, seed=7) != draw_combinations(asked, seed=8)
    assert len({tuple(row.values()) for row in found}) == 20
    assert all(1e-5 <= row["learning_rate"] <= 1e-3 for row in found)
    assert {row["n_epochs"] for row in found} == {1, 2, 3}
    assert {row["batch_size"] for row in found} == {4, 8}
    low = [row for row in found if row["learning_rate"] < 1e-4]
    assert 4 <= len(low) <= 16  # on a linear scale nine of ten would be above


def test_all_of_few_combinations_can_be_drawn() -> None:
    parameters = {"batch_size": {"min": 1, "max": 4}, "lora_rank": [2, 4]}
    assert len(draw_combinations(sweep(search="random", num_trials=8, parameters=parameters), seed=1)) == 8


def test_a_range_that_is_nearly_a_point_ends_the_search_with_fewer_trials() -> None:
    parameters = {"learning_rate": {"min": 1e-4, "max": 1.00001e-4}}
    found = draw_combinations(sweep(search="random", num_trials=9, parameters=parameters), seed=1)
    assert 1 <= len(found) <= 2


@pytest.mark.parametrize("share", [1 / 9, 0.2])
def test_a_trial_is_weak_unless_it_is_among_the_best_third_at_a_rung(share: float) -> None:
    stopper = EarlyStopper()
    assert not stopper.is_weak(1, share, 2.0)  # nobody to compare with
    assert not stopper.is_weak(2, share, 1.0)
    assert stopper.is_weak(3, share, 1.9)
    assert not stopper.is_weak(4, share, 0.9)


def test_only_rungs_decide_and_each_once() -> None:
    stopper = EarlyStopper()
    assert not stopper.is_weak(1, 0.12, 1.0)
    assert not stopper.is_weak(2, 0.05, 9.0)  # before the first rung
    assert not stopper.is_weak(2, 0.12, 0.9)
    assert not stopper.is_weak(2, 0.2, 9.0)  # between the rungs
    assert not stopper.is_weak(1, 0.4, 1.0)
    assert stopper.is_weak(2, 0.4, 1.1)  # at the second
    assert not ray.is_initialized()
