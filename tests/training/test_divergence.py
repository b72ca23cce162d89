"""Which losses are called a divergence."""

from __future__ import annotations

import pytest

from training.divergence import NUM_STEPS, LossWatch
from training.failure import Failure


def watched(losses: list[float]) -> LossWatch:
    watch = LossWatch()
    for loss in losses:
        watch = watch.after(loss)
    return watch


@pytest.mark.parametrize(
    "losses",
    [
        [2.0, *[9.0] * (NUM_STEPS - 1), 1.9, *[9.0] * (NUM_STEPS - 1)],  # spikes that heal
        [0.1, *[0.9] * 100],  # small losses are noisy
        [4.0, *[5.9] * 100],
        [-3.0, *[-2.5] * 100],
    ],
)
def test_losses_that_may_come_down_again_go_on(losses: list[float]) -> None:
    watched(losses).check(len(losses), losses[-1], [])


@pytest.mark.parametrize("losses", [[2.0, *[3.1] * NUM_STEPS], [0.1, *[1.2] * NUM_STEPS], [9.0, *[14.0] * NUM_STEPS]])
def test_losses_far_above_the_first_end_the_run_and_name_a_checkpoint_from_before(losses: list[float]) -> None:
    with pytest.raises(Failure, match=r"checkpoint of step 1 is kept") as caught:
        watched(losses).check(NUM_STEPS + 1, losses[-1], [1, 10])
    assert caught.value.field_of("dpo") == "method.dpo.hyperparameters.learning_rate"
