"""A run that was stopped and went on is the run that was never stopped, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.training.labelled import BERT, make_encoder, make_labelled_spec
from tests.training.runs import Recorder, make_base, make_dpo_spec, make_spec, write_rows
from training.loop import run
from training.progress import ArtifactWritten, CheckpointSaved, EvalMetrics, StepMetrics, Wish
from training.spec import LoraSpec, StartRef, TrainSpec
from training.storage import Storage


def figures(channel: Recorder) -> list[dict[str, Any]]:
    """What the steps and evaluations said, without clocks."""
    items = [item for item in channel.items if isinstance(item, StepMetrics | EvalMetrics)]
    return [item.model_dump(exclude={"seq", "at", "tokens_per_s"}) for item in items]


def cut_after(storage: Storage, spec: TrainSpec, run_key: str, step: int) -> None:
    """Leave the run as a kill right after a step's checkpoint would: nothing later exists."""
    storage.delete(f"{run_key}/artifact")
    for name in storage.list_names(f"{run_key}/checkpoints"):
        if int(name.removeprefix("step-")) > step:
            storage.delete(f"{run_key}/checkpoints/{name}")


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": True, "dropout": 0.3, "gradient_accumulation_steps": 2},
        {"lora": False, "precision": "bf16", "weight_decay": 0.1, "lr_scheduler": "cosine"},
        {"lora": False},
        {"adapter": LoraSpec(rank=4, alpha=4.0, rslora=True, dora=True, dropout=0.3), "precision": "bf16"},
    ],
    ids=["lora-dropout-accumulation", "full-bf16", "full-fp32", "dora-bf16"],
)
def test_ten_steps_are_five_and_five_more(tmp_path: Path, changes: dict[str, Any]) -> None:
    storage = Storage(str(tmp_path / "storage"))
    base = make_base(storage)
    spec = make_spec(storage, base, n_epochs=5, batch_size=6, validation_key="files/train", **changes)
    check_ten_are_five_and_five(storage, spec, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"lora": True, "dropout": 0.3, "gradient_accumulation_steps": 2}, {"lora": False}],
    ids=["lora-dropout-accumulation", "full-fp32"],
)
def test_preferences_resume_with_the_reference_of_the_start_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    storage = Storage(str(tmp_path / "storage"))
    base = make_base(storage)
    spec = make_dpo_spec(storage, base, n_epochs=5, batch_size=6, validation_key="files/pairs", **changes)
    check_ten_are_five_and_five(storage, spec, tmp_path)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_run_from_an_earlier_one_resumes_with_the_reference_of_its_own_start(tmp_path: Path, lora: bool) -> None:
    storage = Storage(str(tmp_path / "storage"))
    base, before = make_base(storage), Recorder()
    run(make_spec(storage, base, lora), storage, "runs/before", before, tmp_path)
    (written,) = before.of(ArtifactWritten)
    start = StartRef(model_id="before", key=written.key, manifest_hash=written.manifest_hash)
    spec = make_dpo_spec(storage, base, lora, n_epochs=5, batch_size=6, validation_key="files/pairs", start=start)
    check_ten_are_five_and_five(storage, spec, tmp_path)
    assert run(spec, storage, "runs/again", again := Recorder(), tmp_path).status == "finished"
    assert again.of(StepMetrics)[0].train_loss == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": True, "dropout": 0.3, "gradient_accumulation_steps": 2},
        {"precision": "bf16", "settings": {"class_weights": "balanced", "label_smoothing": 0.1}},
        {},
    ],
    ids=["lora-dropout-accumulation", "full-bf16-weighted", "full-fp32"],
)
def test_classifiers_resume_with_the_head_they_had(tmp_path: Path, changes: dict[str, Any]) -> None:
    storage = Storage(str(tmp_path / "storage"))
    base = make_encoder(storage, {**BERT, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1})
    fields = {"n_epochs": 5, "batch_size": 6, "validation_key": "files/labelled", **changes}
    check_ten_are_five_and_five(storage, make_labelled_spec(storage, base, **fields), tmp_path)


def check_ten_are_five_and_five(storage: Storage, spec: TrainSpec, tmp_path: Path) -> None:
    whole, resumed = Recorder(), Recorder()
    run(spec, storage, "runs/one", whole, tmp_path)
    assert [item.step for item in whole.of(StepMetrics)] == list(range(1, 11))
    expected = load_file(storage.local_folder("runs/one/checkpoints/step-000010") / "optimizer.safetensors")
    cut_after(storage, spec, "runs/one", 5)
    run(spec, storage, "runs/one", resumed, tmp_path)
    assert figures(resumed) == figures(whole)[-len(figures(resumed)) :]
    assert [item.step for item in resumed.of(StepMetrics)] == list(range(6, 11))
    found = load_file(storage.local_folder("runs/one/checkpoints/step-000010") / "optimizer.safetensors")
    assert found.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    assert resumed.of(CheckpointSaved)[-1].manifest_hash == whole.of(CheckpointSaved)[-1].manifest_hash


def test_a_pause_leaves_no_evaluation_out(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "storage"))
    valid = write_rows(storage, "files/valid", num_rows=2)
    spec = make_spec(storage, make_base(storage), n_epochs=6, validation_key=valid, eval_interval=1)
    whole, paused, resumed = Recorder(), Recorder(Wish.CHECKPOINT_AND_STOP, at_step=1), Recorder()
    run(spec, storage, "runs/whole", whole, tmp_path)
    assert run(spec, storage, "runs/paused", paused, tmp_path).status == "stopped"
    run(spec, storage, "runs/paused", resumed, tmp_path)
    assert figures(paused) + figures(resumed) == figures(whole)
