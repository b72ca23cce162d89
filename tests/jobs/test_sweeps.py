"""The life of a sweep: its trials are jobs, the best one's model is its own, and nothing that is over runs again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.jobs import endings, sweep_driver
from service.jobs.launchers import LoopFit
from service.jobs.publish import artifact_key
from service.jobs.recorder import RunRecorder
from service.jobs.rehearsal import TOKENS_PER_STEP, Rehearsal, badness, loss
from service.jobs.states import Desired, JobKind, JobState
from service.jobs.sweeps import Sweep, result_of
from service.store import jobs, models, runs
from service.store.tables import Job
from tests.jobs.world import GOOD_LINES, PATIENCE_S, World
from tests.training.runs import make_base
from training.artifact import read_manifest
from training.spec import Hyperparameters, TrainSpec
from training.storage import Storage

Build = Callable[..., World]


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver looks at its trials again at once: these take milliseconds."""
    monkeypatch.setattr(sweep_driver, "LOOK_S", 0.01)


REQUEST = {"model": "tiny", "hyperparameters": {"n_epochs": 3, "batch_size": 5}, "integrations": []}
NUM_STEPS = 6  # 10 training rows, 5 a step, 3 epochs; a rehearsal does not count for itself


class Rehearsals:
    """A `Fit`: each run a rehearsal, which `before` may hold up. It hears the run's spec, its recorder and the step."""

    def __init__(self, storage: Storage, before: Callable[[TrainSpec, RunRecorder, int], None]) -> None:
        self._storage, self._before = storage, before

    def __call__(self, spec: TrainSpec, run_key: str, recorder: RunRecorder) -> None:
        """Rehearse."""
        rehearsal = Rehearsal(self._storage, NUM_STEPS, 2, lambda step: self._before(spec, recorder, step))
        rehearsal(spec, run_key, recorder)


class HoldsUp:
    """Stops the trials of one learning rate before a step until they are let go."""

    def __init__(self, learning_rate: float, step: int = 3) -> None:
        self.learning_rate, self.step = learning_rate, step
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, spec: TrainSpec, _recorder: RunRecorder, step: int) -> None:
        """Called before each step."""
        if spec.hyperparameters.learning_rate == self.learning_rate and step == self.step:
            self.reached.set()
            assert self.opened.wait(PATIENCE_S)


def nothing(*_: object) -> None:
    """Holds up nobody."""


def sweeping(build: Build, before: Callable[[TrainSpec, RunRecorder, int], None] = nothing, **choices: Any) -> World:
    """A platform with a tiny base, whose runs are rehearsals of six steps."""
    return build(make_fit=lambda storage: Rehearsals(storage, before), **choices)


def create(world: World, **settings: Any) -> Job:
    """A sweep as the API leaves it: by default over three learning rates, of which the second is the best."""
    asked = {"parameters": {"learning_rate": [0.01, 0.001, 0.0001]}, "max_concurrent": 1} | settings
    sweep = Sweep.model_validate(asked)
    if read_manifest(world.storage, "bases/tiny") is None:
        make_base(world.storage)
    manifest = read_manifest(world.storage, "bases/tiny")
    assert manifest is not None
    spec = TrainSpec.model_validate(
        {
            "base": {"id": "tiny", "key": "bases/tiny", "content_hash": manifest.base_content_hash},
            "training_key": "-",
            "validation_split": 0.2,
            "hyperparameters": Hyperparameters(n_epochs=3, batch_size=5).model_dump(),
        }
    )
    fields = {"kind": JobKind.SWEEP, "sweep": sweep.model_dump(mode="json"), "suffix": "best"}
    return world.create(world.upload(GOOD_LINES), spec, **fields, request={**REQUEST, "sweep": asked})


def trials_of(world: World, sweep: Job) -> list[Job]:
    with world.db.read() as tx:
        return jobs.trials(tx, sweep)


def states_of(world: World, sweep: Job) -> list[str]:
    return [trial.state for trial in trials_of(world, sweep)]


def published(world: World) -> list[str]:
    """Ids of the models that are no checkpoints."""
    with world.db.read() as tx:
        return [model.id for model in models.all_live(tx) if not model.is_checkpoint]


def lose_driver(world: World, sweep: Job) -> None:
    """Its process is killed, and the orchestrator notices."""
    run = world.run(sweep)
    world.launcher.kill(run.id)
    with world.db.write() as tx:
        assert endings.lost(tx, run, reason="The worker was lost", max_attempts=world.settings.max_attempts)


def test_the_best_trials_model_is_the_sweeps_and_the_artifacts_of_the_others_are_removed(build: Build) -> None:
    world = sweeping(build)
    sweep = world.tick_to(create(world), JobState.SUCCEEDED)
    trials = trials_of(world, sweep)
    assert [(trial.trial_number, trial.state, trial.fine_tuned_model) for trial in trials] == [
        (1, JobState.SUCCEEDED, None),
        (2, JobState.SUCCEEDED, None),
        (3, JobState.SUCCEEDED, None),
    ]
    for trial in trials:
        expected = 2 * loss(NUM_STEPS) * badness(TrainSpec.model_validate(trial.spec))
        assert (result_of(trial).valid_loss, result_of(trial).step) == (expected, NUM_STEPS)
        rate = trial.spec["hyperparameters"]["learning_rate"]
        # What a suggestion after too little memory is made of, and where trackers read that they are wanted.
        method = {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate": rate}}}
        assert trial.request == {**REQUEST, "method": method}
    assert published(world) == [sweep.fine_tuned_model]
    assert (sweep.fine_tuned_model or "").startswith("ft:tiny:local:best:")
    with world.db.read() as tx:
        model = models.by_id(tx, sweep.fine_tuned_model or "")
    assert model is not None
    assert (model.job_id, model.storage_key) == (sweep.id, artifact_key(trials[1].id))
    assert sweep.spec == trials[1].spec
    assert sweep.spec["hyperparameters"]["learning_rate"] == 0.001
    assert sweep.trained_tokens == 3 * NUM_STEPS * TOKENS_PER_STEP
    assert world.result_csv(sweep) == world.result_csv(trials[1])

    def kept() -> list[bool]:
        return [read_manifest(world.storage, artifact_key(trial.id)) is not None for trial in trials]

    world.tick_until(lambda: kept() == [False, True, False])


def test_the_sweeps_events_tell_every_trial(build: Build) -> None:
    world = sweeping(build)
    sweep = world.tick_to(create(world), JobState.SUCCEEDED)
    first = trials_of(world, sweep)[0]
    texts = world.messages(sweep)
    assert texts[1:4] == [
        "Sweep started",
        f"Trial 1 of 3 created: learning_rate 0.01 ({first.id})",
        "Trial 1 of 3 finished: valid_loss 2.286, learning_rate 0.01",
    ]
    assert texts[-3:] == [
        "Trial 2 of 3 is the best: valid_loss 1.143, learning_rate 0.001",
        f"New fine-tuned model created: {sweep.fine_tuned_model}",
        "The job has successfully completed",
    ]
    told = next(event for event in world.events(sweep) if event.message.startswith("Trial 3 of 3 finished"))
    assert told.data is not None
    assert (told.data["trial"], told.data["num_trials"], told.data["step"]) == (3, 3, NUM_STEPS)
    assert world.messages(first)[0] == f"Created as trial 1 of 3 of the sweep {sweep.id}: learning_rate 0.01"
    assert any(text.startswith("Step 2/6: validation loss=") for text in world.messages(first))


def test_a_weak_trial_is_stopped_early_and_publishes_nothing(build: Build) -> None:
    world: World

    def until_stopped(spec: TrainSpec, recorder: RunRecorder, step: int) -> None:
        """The trial of 0.1 goes no further than step 3 unless it is told to stop."""
        if spec.hyperparameters.learning_rate == 0.1 and step == 4:
            with world.db.read() as tx:
                trial = runs.get(tx, recorder.run_id).job_id
            pause = threading.Event()
            while world.job(Job(id=trial)).desired != Desired.CANCEL:
                pause.wait(0.01)

    world = sweeping(build, until_stopped)
    job = create(world, scheduler="asha", parameters={"learning_rate": [0.001, 0.1, 0.002]})
    sweep = world.tick_to(job, JobState.SUCCEEDED)
    best, weak, _ = trials_of(world, sweep)
    assert (weak.state, best.state) == (JobState.CANCELLED, JobState.SUCCEEDED)
    assert result_of(weak).stopped_early_at_step == 1
    assert published(world) == [sweep.fine_tuned_model]
    assert sweep.spec == best.spec
    early = [text for text in world.messages(sweep) if "stopped early" in text]
    assert early[0].startswith("Trial 2 of 3 stopped early at step 1: valid_loss ")
    assert "Stopped early after the evaluation of step 1: other trials are better" in world.messages(weak)


def test_cancelling_a_sweep_cancels_its_trials_and_starts_no_more(build: Build) -> None:
    hold = HoldsUp(0.001)
    world = sweeping(build, hold)
    sweep = create(world)
    world.tick_until(hold.reached.is_set)
    assert world.wish(jobs.request_cancel, sweep).state == JobState.RUNNING
    assert [trial.desired for trial in trials_of(world, sweep)] == [Desired.RUN, Desired.CANCEL]
    hold.opened.set()
    world.tick_to(sweep, JobState.CANCELLED)
    assert states_of(world, sweep) == [JobState.SUCCEEDED, JobState.CANCELLED]
    assert published(world) == []


def test_a_sweep_that_waits_for_its_next_driver_is_cancelled_at_once_with_its_trials(build: Build) -> None:
    hold = HoldsUp(0.01)
    world = sweeping(build, hold)
    sweep = create(world, max_concurrent=2)  # and one trial waits in the queue
    world.tick_until(hold.reached.is_set)
    lose_driver(world, sweep)
    assert world.wish(jobs.request_cancel, sweep).state == JobState.CANCELLED
    assert [trial.desired for trial in trials_of(world, sweep)] == [Desired.CANCEL, Desired.CANCEL]
    hold.opened.set()
    world.tick_until(lambda: states_of(world, sweep) == [JobState.CANCELLED, JobState.CANCELLED])


def test_a_paused_sweep_goes_on_where_its_trials_were(build: Build) -> None:
    hold = HoldsUp(0.001)
    world = sweeping(build, hold)
    sweep = create(world)
    world.tick_until(hold.reached.is_set)
    world.wish(jobs.request_pause, sweep)
    hold.opened.set()
    world.tick_to(sweep, JobState.PAUSED)
    assert states_of(world, sweep) == [JobState.SUCCEEDED, JobState.PAUSED]
    world.wish(jobs.request_resume, sweep)
    world.tick_to(sweep, JobState.SUCCEEDED)
    attempts = [world.run(trial) for trial in trials_of(world, sweep)]
    assert [(run.attempt, run.resumed_from) for run in attempts] == [(1, 0), (2, 3), (1, 0)]


def test_a_sweep_whose_driver_is_killed_goes_on_without_repeating_a_trial(build: Build) -> None:
    hold = HoldsUp(0.001)
    world = sweeping(build, hold)
    sweep = create(world)
    world.tick_until(hold.reached.is_set)
    lose_driver(world, sweep)
    assert "The worker was lost; continuing with the trials left" in world.messages(sweep)
    world.tick_until(lambda: world.job(sweep).state == JobState.RUNNING)
    hold.opened.set()
    sweep = world.tick_to(sweep, JobState.SUCCEEDED)
    assert world.run(sweep).attempt == 2
    assert [world.run(trial).attempt for trial in trials_of(world, sweep)] == [1, 1, 1]
    assert len([text for text in world.messages(sweep) if text.startswith("Trial 1 of 3 finished")]) == 1
    assert published(world) == [sweep.fine_tuned_model]


def test_a_drained_sweep_and_its_trial_go_back_to_the_queue_and_go_on(build: Build) -> None:
    hold = HoldsUp(0.001)
    world = sweeping(build, hold)
    sweep = create(world)
    world.tick_until(hold.reached.is_set)
    drain = threading.Thread(target=world.orchestrator.drain, args=(PATIENCE_S,))
    drain.start()
    world.tick_until(lambda: world.orchestrator._drain_until is not None)
    world.orchestrator.tick()
    hold.opened.set()
    world.tick_until(lambda: not drain.is_alive())
    assert [world.job(sweep).state, *states_of(world, sweep)] == [
        JobState.QUEUED,
        JobState.SUCCEEDED,
        JobState.QUEUED,
    ]
    restarted = sweeping(build)
    restarted.tick_to(sweep, JobState.SUCCEEDED)
    assert [restarted.run(trial).resumed_from for trial in trials_of(restarted, sweep)] == [0, 3, 0]


def test_a_sweep_that_crashes_without_getting_on_fails_and_takes_its_trials_along(build: Build) -> None:
    hold = HoldsUp(0.01)
    world = sweeping(build, hold, max_attempts=2)
    sweep = create(world)
    world.tick_until(hold.reached.is_set)
    lose_driver(world, sweep)
    world.tick_until(lambda: world.job(sweep).state == JobState.RUNNING)
    lose_driver(world, sweep)
    failed = world.job(sweep)
    assert (failed.state, (failed.error or {})["code"]) == (JobState.FAILED, "crashed")
    assert [trial.desired for trial in trials_of(world, sweep)] == [Desired.CANCEL]
    hold.opened.set()
    world.tick_until(lambda: states_of(world, sweep) == [JobState.CANCELLED])


def test_a_trial_that_cannot_work_leaves_the_others_to_the_sweep(build: Build) -> None:
    world = sweeping(build)
    sweep = world.tick_to(create(world, parameters={"lora_rank": [4, 500]}), JobState.SUCCEEDED)
    assert states_of(world, sweep) == [JobState.SUCCEEDED, JobState.FAILED]
    assert any(text.startswith("Trial 2 of 2 failed: LoRA rank 500 is more") for text in world.messages(sweep))


def test_a_sweep_of_which_no_trial_comes_to_a_model_fails_and_says_why(build: Build) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("the socket was closed")

    world = sweeping(build, crash, max_attempts=1)
    sweep = world.tick_to(create(world, parameters={"batch_size": [4]}), JobState.FAILED)
    assert sweep.error is not None
    assert sweep.error["code"] == "crashed"
    assert "No trial came to a model" in sweep.error["message"]
    assert "the socket was closed" in sweep.error["message"]


def test_a_combination_that_cannot_work_is_found_before_anything_runs(build: Build) -> None:
    world = sweeping(build)
    sweep = world.tick_to(create(world, parameters={"lora_rank": [500]}), JobState.FAILED)
    assert (sweep.error or {})["param"] == "sweep.parameters.lora_rank"
    assert trials_of(world, sweep) == []


def test_trials_work_beside_each_other_as_far_as_they_may(build: Build) -> None:
    first, second = HoldsUp(0.01), HoldsUp(0.001)

    def both(spec: TrainSpec, recorder: RunRecorder, step: int) -> None:
        first(spec, recorder, step)
        second(spec, recorder, step)

    world = sweeping(build, both, num_slots=4)
    sweep = create(world, max_concurrent=2)
    world.tick_until(lambda: first.reached.is_set() and second.reached.is_set())
    assert len(trials_of(world, sweep)) == 2
    first.opened.set()
    second.opened.set()
    world.tick_to(sweep, JobState.SUCCEEDED)


def test_a_real_sweep_is_won_by_the_lowest_validation_loss(build: Build, tmp_path: Path) -> None:
    world = build(make_fit=lambda storage: LoopFit(storage, tmp_path / "scratch"))
    search = {"search": "random", "num_trials": 2, "scheduler": "asha"}
    job = create(world, parameters={"learning_rate": [1e-7, 0.02], "lora_rank": [4]}, **search)
    sweep = world.tick_to(job, JobState.SUCCEEDED)
    losses = {result_of(trial).parameters["learning_rate"]: result_of(trial) for trial in trials_of(world, sweep)}
    assert losses[0.02].valid_loss is not None
    assert losses[1e-7].valid_loss is not None
    assert losses[0.02].valid_loss < losses[1e-7].valid_loss
    assert sweep.spec["hyperparameters"]["learning_rate"] == 0.02
    assert sweep.spec["adapter"]["rank"] == 4
