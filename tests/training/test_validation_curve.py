"""A run that overfits: its best checkpoint becomes the model, its owner is told, and it may stop early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.training.runs import Recorder, make_base, make_spec, write_rows
from tests.training.test_resume import cut_after
from training.artifact import read_manifest, verify
from training.checkpoints import Checkpoints
from training.loop import Outcome, run
from training.progress import (
    ArtifactWritten,
    CheckpointDeleted,
    CheckpointSaved,
    EvalMetrics,
    Item,
    Message,
    StepMetrics,
    Stopped,
    Wish,
)
from training.spec import EarlyStopping, TrainSpec
from training.storage import Storage
from training.validation_curve import ValidationCurve

NUM_STEPS = 16


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def overfitting(storage: Storage, lora: bool = True, **changes: Any) -> TrainSpec:
    """16 steps over 12 rows at a high rate, measured on rows unlike them after every step."""
    fields: dict[str, Any] = {
        "n_epochs": 8,
        "batch_size": 6,
        "learning_rate": 0.05 if lora else 0.02,
        "lr_scheduler": "constant",
        "validation_key": write_rows(storage, "files/valid", 4, first=500),
        "eval_interval": 1,
    }
    return make_spec(storage, make_base(storage), lora, **(fields | changes))


def texts(channel: Recorder) -> list[str]:
    return [item.text for item in channel.of(Message)]


def lowest(channel: Recorder) -> int:
    """Step of the first of the lowest validation losses, from what was reported."""
    return min(channel.of(EvalMetrics), key=lambda item: (item.valid_loss, item.step)).step


def said(channel: Recorder, *kinds: type[Item]) -> list[dict[str, Any]]:
    """What was said of these kinds, without clocks and counters."""
    items = [item for item in channel.items if isinstance(item, kinds)]
    return [item.model_dump(exclude={"seq", "at", "tokens_per_s"}) for item in items]


# -- the bookkeeping ---------------------------------------------------------------------------------------------------


def curve_of(losses: list[float], early_stopping: EarlyStopping | None = None) -> tuple[ValidationCurve, list[str]]:
    """The curve after evaluations at steps 10, 20, …, and its warnings."""
    curve, warnings = ValidationCurve(), []
    for number, loss in enumerate(losses, start=1):
        curve = curve.after(10 * number, loss, early_stopping)
        warnings += [warning for warning in [curve.warning(10 * number)] if warning is not None]
    return curve, warnings


def test_the_best_is_the_lowest_and_a_tie_keeps_the_earlier() -> None:
    curve, _ = curve_of([3.0, 2.0, 2.5, 2.0])
    assert (curve.best_step, curve.best_loss) == (20, 2.0)


@pytest.mark.parametrize(
    ("losses", "min_delta", "num_in_vain"),
    [
        ([3.0, 2.0, 2.0, 2.1], 0.0, 2),
        ([3.0, 2.0, 2.1, 1.9], 0.0, 0),
        ([3.0, 2.75, 2.5], 0.5, 0),  # slow but steady: together it is enough
        ([3.0, 2.75, 2.75, 2.625], 0.5, 3),
    ],
)
def test_patience_counts_evaluations_that_did_not_improve_by_min_delta(
    losses: list[float], min_delta: float, num_in_vain: int
) -> None:
    early = EarlyStopping(patience=2, min_delta=min_delta)
    curve, _ = curve_of(losses, early)
    assert curve.num_in_vain == num_in_vain
    assert curve.has_lost_patience(early) is (num_in_vain >= 2)
    assert not curve.has_lost_patience(None)


def test_a_rise_is_told_once_for_each_best_checkpoint() -> None:
    assert curve_of([3.0, 2.0, 2.5, 2.4, 2.5])[1] == []  # up and down is noise
    _, warnings = curve_of([3.0, 2.0, 2.5, 2.6, 2.7, 2.5, 2.6, 2.8, 1.0, 1.1, 1.2])
    assert warnings == [
        f"The validation loss rises since step {step}; the checkpoint of step {step} is kept and will be the model "
        "unless it falls again."
        for step in (20, 90)
    ]


def test_the_endings_in_words() -> None:
    early = EarlyStopping(patience=2)
    curve, _ = curve_of([3.0, 1.2345, 2.5, 2.6], early)
    assert curve.endings(40, 100, early) == [
        "Stopped early at step 40: the validation loss has not improved on 1.234 for 2 evaluations.",
        "The model is the checkpoint of step 20, whose validation loss 1.234 is the lowest.",
    ]
    assert curve.endings(40, 40, early)[0].startswith("The model is")
    assert curve.endings(20, 20, None) == []
    assert ValidationCurve().endings(20, 20, None) == []


# -- real runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_model_is_the_best_checkpoint_to_the_bit(storage: Storage, tmp_path: Path, lora: bool) -> None:
    spec = overfitting(storage, lora)
    channel = Recorder()
    assert run(spec, storage, "runs/one", channel, tmp_path) == Outcome("finished", NUM_STEPS)
    best = lowest(channel)
    assert best < NUM_STEPS
    (artifact,) = channel.of(ArtifactWritten)
    manifest = verify(storage, artifact.key, artifact.manifest_hash)
    assert artifact.step == manifest.step == best
    assert (manifest.kind, manifest.last_step) == ("adapter" if lora else "full", NUM_STEPS)
    folders = [storage.local_folder(f"runs/one/{name}") for name in ("artifact", f"checkpoints/step-{best:06d}")]
    names = {path.name for path in folders[0].iterdir()}
    assert {path.name for path in folders[1].iterdir()} - names == {"optimizer.safetensors", "trainer_state.json"}
    for name in names - {"manifest.json"}:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    loss = min(item.valid_loss for item in channel.of(EvalMetrics))
    assert texts(channel)[-1] == (
        f"The model is the checkpoint of step {best}, whose validation loss {loss:.4g} is the lowest."
    )
    assert [item.level for item in channel.of(Message) if "rises since" in item.text] == ["warn"]


def test_a_finished_run_says_its_best_step_again(storage: Storage, tmp_path: Path) -> None:
    spec = overfitting(storage)
    first, second = Recorder(), Recorder()
    outcome = run(spec, storage, "runs/one", first, tmp_path)
    assert run(spec, storage, "runs/one", second, tmp_path) == outcome
    assert said(second, ArtifactWritten) == said(first, ArtifactWritten)


def test_pruning_keeps_the_last_k_of_the_intervals_and_the_best(storage: Storage, tmp_path: Path) -> None:
    spec = overfitting(storage, checkpoint_interval=3, keep_checkpoints=2)
    channel = Recorder()
    run(spec, storage, "runs/one", channel, tmp_path)
    best, there = lowest(channel), set[int]()
    losses: dict[int, float] = {}
    for item in channel.items:
        if isinstance(item, EvalMetrics):
            losses[item.step] = item.valid_loss
        elif isinstance(item, CheckpointSaved):
            there.add(item.step)
        elif isinstance(item, CheckpointDeleted):
            there.remove(item.step)
            assert min(losses, key=lambda step: (losses[step], step)) in there, "the best so far is always there"
    assert there == {15, 16, best}
    assert Checkpoints(storage, "runs/one", spec).committed() == sorted(there)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_early_stopping_ends_at_the_expected_step(storage: Storage, tmp_path: Path, lora: bool) -> None:
    whole, stopped = Recorder(), Recorder()
    run(overfitting(storage, lora), storage, "runs/whole", whole, tmp_path)
    losses = [item.valid_loss for item in whole.of(EvalMetrics)]
    expected = next(i + 1 for i in range(2, NUM_STEPS) if min(losses[i - 1 : i + 1]) >= min(losses[: i - 1]))
    assert expected < NUM_STEPS
    storage.delete("bases/tiny")
    spec = overfitting(storage, lora, early_stopping=EarlyStopping(patience=2))
    assert run(spec, storage, "runs/one", stopped, tmp_path) == Outcome("finished", expected)
    assert said(stopped, StepMetrics, EvalMetrics) == said(whole, StepMetrics, EvalMetrics)[: 2 * expected]
    manifest = read_manifest(storage, "runs/one/artifact")
    assert manifest is not None
    assert (manifest.step, manifest.last_step) == (lowest(stopped), expected)
    assert texts(stopped)[-2].startswith(f"Stopped early at step {expected}: the validation loss has not improved on")
    assert texts(stopped)[-1].startswith(f"The model is the checkpoint of step {lowest(stopped)},")
    assert not stopped.of(Stopped)


def _artifact(storage: Storage) -> dict[str, Any]:
    return load_file(storage.local_folder("runs/one/artifact") / "adapter_model.safetensors")


@pytest.mark.parametrize("cut", [2, 5, NUM_STEPS])
def test_a_killed_run_stops_early_at_the_same_step_with_the_same_words(
    storage: Storage, tmp_path: Path, cut: int
) -> None:
    """Killed after any checkpoint, also after the last one, when only the artifact is missing."""
    spec = overfitting(storage, early_stopping=EarlyStopping(patience=2), keep_checkpoints=50, checkpoint_interval=1)
    whole, resumed = Recorder(), Recorder()
    outcome = run(spec, storage, "runs/one", whole, tmp_path)
    manifest, weights = read_manifest(storage, "runs/one/artifact"), _artifact(storage)
    step = min(cut, outcome.step)
    cut_after(storage, spec, "runs/one", step)
    assert run(spec, storage, "runs/one", resumed, tmp_path) == outcome
    kinds = (StepMetrics, EvalMetrics, Message, ArtifactWritten)
    ours = [item for item in said(resumed, *kinds) if not item.get("text", "").startswith("Resumed")]
    assert ours == said(whole, *kinds)[-len(ours) :]
    assert [item.step for item in resumed.of(StepMetrics)] == list(range(step + 1, outcome.step + 1))
    assert read_manifest(storage, "runs/one/artifact") == manifest
    assert all(tensor.equal(weights[name]) for name, tensor in _artifact(storage).items())


def test_a_run_stopped_by_wish_again_and_again_is_the_uninterrupted_one(storage: Storage, tmp_path: Path) -> None:
    spec = overfitting(storage, early_stopping=EarlyStopping(patience=2), eval_interval=2)
    whole, pieces = Recorder(), Recorder()
    outcome = run(spec, storage, "runs/whole", whole, tmp_path)
    while True:
        piece = Recorder(Wish.CHECKPOINT_AND_STOP, at_step=1)
        ended = run(spec, storage, "runs/pieces", piece, tmp_path)
        pieces.items += piece.items
        if ended.status == "finished":
            break
    assert len(pieces.of(Stopped)) > 1
    assert ended == outcome
    assert said(pieces, StepMetrics, EvalMetrics) == said(whole, StepMetrics, EvalMetrics)
    assert [text for text in texts(pieces) if not text.startswith("Resumed")] == texts(whole)
    kept = [read_manifest(storage, f"runs/{name}/artifact") for name in ("whole", "pieces")]
    assert kept[0] == kept[1]


def test_without_a_validation_set_the_last_step_is_the_model(storage: Storage, tmp_path: Path) -> None:
    channel = Recorder()
    run(overfitting(storage, validation_key=None), storage, "runs/one", channel, tmp_path)
    assert [item.step for item in channel.of(CheckpointSaved)] == [5, 10, 15, 16]
    assert storage.list_names("runs/one/checkpoints") == ["step-000010", "step-000015", "step-000016"]
    assert channel.of(ArtifactWritten)[0].step == 16
    assert not channel.of(EvalMetrics)
    assert not channel.of(Message)
