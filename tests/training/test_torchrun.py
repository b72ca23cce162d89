"""The command line, alone and under torchrun with several workers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training import test_embedding
from tests.training.labelled import make_encoder, make_labelled_spec
from tests.training.runs import make_base, make_dpo_spec, make_spec, write_rows
from tests.training.test_resume import cut_after
from tests.training.workers import arguments, numbers, train
from training.artifact import read_manifest
from training.spec import EarlyStopping, LoraSpec, StartRef, TrainSpec
from training.storage import Storage

pytestmark = pytest.mark.torchrun

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def test_torchrun_starts_the_run_that_forked_workers_make(storage: Storage) -> None:
    """To the bit: what the others of this file find out holds for torchrun."""
    spec = make_spec(storage, make_base(storage), dropout=0.2, n_epochs=1, num_workers=2)
    forked = train(storage, spec, "runs/forked")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "training"]
    command = [*launcher, *arguments(storage, spec, "runs/launched")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert numbers(storage, "runs/launched") == forked


@pytest.mark.parametrize("num_workers", [2, 3])
def test_several_workers_resume_to_the_bit_and_agree_with_one(storage: Storage, num_workers: int) -> None:
    base = make_base(storage)
    fields = {"n_epochs": 2, "batch_size": 5, "checkpoint_interval": 2, "keep_checkpoints": 9}
    fields |= {"validation_key": "files/train", "gradient_accumulation_steps": 2}
    alone = train(storage, make_spec(storage, base, **fields), "runs/alone")
    spec = make_spec(storage, base, num_workers=num_workers, **fields)
    whole = train(storage, spec, "runs/many")
    for ours, theirs in zip(whole, alone, strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    spec = make_spec(storage, base, num_workers=num_workers, dropout=0.2, **fields)
    whole = train(storage, spec, "runs/dropout")
    last = "runs/dropout/checkpoints/step-000006"
    expected = storage.read_bytes(f"{last}/optimizer.safetensors")
    for key in ("runs/dropout/artifact", last, "runs/dropout/checkpoints/step-000004"):
        storage.delete(key)
    resumed = train(storage, spec, "runs/dropout")
    assert resumed == whole[-len(resumed) :]
    assert [item["step"] for item in resumed if item["kind"] == "step"] == [3, 4, 5, 6]
    assert storage.read_bytes(f"{last}/optimizer.safetensors") == expected


@pytest.mark.parametrize("lora", [False, True], ids=["full", "dora-from-an-earlier-one"])
def test_two_workers_share_pairs_the_reference_of_the_start_and_wait_for_samples(storage: Storage, lora: bool) -> None:
    base = make_base(storage)
    fields: dict[str, Any] = {"lora": lora, "n_epochs": 2, "batch_size": 5, "learning_rate": 1e-3}
    fields |= {"validation_key": "files/pairs", "eval_interval": 2, "sample_prompts": ("hi",)}
    if lora:
        fields["adapter"] = LoraSpec(rank=4, alpha=8.0, dora=True)
        before = make_spec(storage, base, adapter=fields["adapter"])
        train(storage, before, "runs/before")
        manifest = read_manifest(storage, "runs/before/artifact")
        assert manifest is not None
        fields["start"] = StartRef(model_id="before", key="runs/before/artifact", manifest_hash=manifest.hash())
    alone = train(storage, make_dpo_spec(storage, base, **fields), "runs/alone")
    shared = train(storage, make_dpo_spec(storage, base, num_workers=2, **fields), "runs/two")
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert b'"kind":"sample"' in storage.read_bytes("runs/two/progress.jsonl")


def test_two_workers_share_texts_and_report_on_all_of_them(storage: Storage) -> None:
    base = make_encoder(storage)
    fields = {"n_epochs": 2, "batch_size": 5, "validation_key": "files/labelled", "learning_rate": 1e-3}
    alone = train(storage, make_labelled_spec(storage, base, **fields), "runs/alone")
    shared = train(storage, make_labelled_spec(storage, base, num_workers=2, **fields), "runs/two")
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    reports = [json.loads(storage.read_bytes(f"runs/{run}/artifact/evaluation.json")) for run in ("two", "alone")]
    assert reports[0]["confusion_matrix"] == reports[1]["confusion_matrix"]
    assert reports[0]["temperature"] == pytest.approx(reports[1]["temperature"], rel=1e-3)


def test_two_workers_with_pools_of_their_own_resume_to_the_bit(storage: Storage, tmp_path: Path) -> None:
    base = test_embedding.make_encoder(storage, tmp_path)
    fields = {
        "num_workers": 2,
        "batch_size": 8,
        "n_epochs": 2,
        "validation_key": "files/pairs",
        "checkpoint_interval": 2,
    }
    spec = test_embedding.make_spec(storage, base, **fields)
    whole = train(storage, spec, "runs/one")
    last = "runs/one/checkpoints/step-000004"
    expected = storage.read_bytes(f"{last}/optimizer.safetensors")
    for key in ("runs/one/artifact", last):
        storage.delete(key)
    assert train(storage, spec, "runs/one") == whole[-3:]
    assert storage.read_bytes(f"{last}/optimizer.safetensors") == expected
    # In an elastic range a worker alone has the pools of two, and BERT's dropout on each, so the same loss.
    elastic = spec.model_copy(update={"min_workers": 1})
    agree(train(storage, elastic, "runs/fewer", num_workers=1), whole)


@pytest.mark.parametrize("method", ["dpo", "classification"])
def test_two_workers_of_other_methods_resume_to_the_bit_too(storage: Storage, method: str) -> None:
    fields: dict[str, Any] = {"num_workers": 2, "n_epochs": 2, "batch_size": 5, "checkpoint_interval": 2}
    if method == "dpo":
        spec = make_dpo_spec(storage, make_base(storage), validation_key="files/pairs", **fields)
    else:
        spec = make_labelled_spec(storage, make_encoder(storage), validation_key="files/labelled", **fields)
    whole = train(storage, spec, "runs/one")
    last = max(storage.list_names("runs/one/checkpoints"))
    expected = storage.read_bytes(f"runs/one/checkpoints/{last}/optimizer.safetensors")
    cut_after(storage, spec, "runs/one", 2)
    resumed = train(storage, spec, "runs/one")
    assert resumed[0]["step"] == 3
    assert resumed == whole[-len(resumed) :]
    assert storage.read_bytes(f"runs/one/checkpoints/{last}/optimizer.safetensors") == expected


def agree(items: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Equal but for the order in which fp32 numbers were added."""
    for ours, theirs in zip(items, others, strict=True):
        assert {**ours, "kind": 0} == pytest.approx({**theirs, "kind": 0}, rel=1e-5, abs=1e-6)


def test_sigterm_makes_a_checkpoint_and_the_same_command_goes_on(storage: Storage) -> None:
    spec = make_spec(storage, make_base(storage), n_epochs=20, batch_size=1, checkpoint_interval=10_000)
    command = [sys.executable, "-m", "training", *arguments(storage, spec, "runs/one")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step 1/240")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "checkpoint of step" in out
    assert "stopped" in out
    resumed = train(storage, spec, "runs/one")
    assert 2 < resumed[0]["step"] < 240
    assert resumed[-1]["step"] == 240


def test_a_faulty_spec_is_one_clear_line_and_exit_code_one(storage: Storage) -> None:
    spec = make_spec(storage, make_base(storage))
    command = [sys.executable, "-m", "training", *arguments(storage, spec, "runs/one")]
    Path(storage.path("runs/one.json")).write_text('{"learning_rate": 1}')
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("cannot start:")
    assert "Traceback" not in done.stderr


def test_several_workers_agree_on_the_best_step_and_when_to_stop(storage: Storage) -> None:
    fields: dict[str, Any] = {
        "n_epochs": 8,
        "batch_size": 6,
        "learning_rate": 0.05,
        "lr_scheduler": "constant",
        "eval_interval": 1,
    }
    fields |= {"validation_key": write_rows(storage, "files/valid", 4, first=500)}
    fields |= {"early_stopping": EarlyStopping(patience=2), "num_workers": 2}
    items = train(storage, make_spec(storage, make_base(storage), **fields), "runs/one")
    losses = {item["step"]: item["valid_loss"] for item in items if item["kind"] == "eval"}
    best = min(losses, key=lambda step: (losses[step], step))
    manifest = read_manifest(storage, "runs/one/artifact")
    assert manifest is not None
    assert (manifest.step, manifest.last_step) == (best, max(losses))
    assert max(losses) == best + 2 < 16


def spread(storage: Storage, **changes: Any) -> tuple[TrainSpec, TrainSpec]:
    """The same run with whole and with sharded weights. The last of its batches leaves one of two workers idle."""
    fields: dict[str, Any] = {"n_epochs": 3, "batch_size": 5, "gradient_accumulation_steps": 3, "num_workers": 2}
    fields |= {"training_key": write_rows(storage, "files/six", 6), "checkpoint_interval": 2, "eval_interval": 2}
    fields |= {"validation_key": write_rows(storage, "files/valid", 3, first=50), "keep_checkpoints": 9, **changes}
    base = make_base(storage)
    return make_spec(storage, base, **fields), make_spec(storage, base, parallel="fsdp", **fields)


def test_sharded_weights_give_the_losses_of_whole_ones_and_either_goes_on_from_the_other(storage: Storage) -> None:
    data, fsdp = spread(storage, lora=False)
    whole, sharded = train(storage, data, "runs/data"), train(storage, fsdp, "runs/fsdp")
    agree(sharded, whole)
    for run in ("runs/data", "runs/fsdp"):
        cut_after(storage, fsdp, run, 4)
    resumed = train(storage, fsdp, "runs/fsdp")
    assert resumed == sharded[-len(resumed) :]
    agree(train(storage, fsdp, "runs/data"), whole[-len(resumed) :])
    cut_after(storage, fsdp, "runs/fsdp", 4)
    agree(train(storage, data, "runs/fsdp"), whole[-len(resumed) :])


def test_an_adapter_on_sharded_weights_gives_the_losses_of_whole_ones(storage: Storage) -> None:
    data, fsdp = spread(storage, lora=True, dropout=0.2)
    agree(train(storage, fsdp, "runs/fsdp"), train(storage, data, "runs/data"))


def test_preferences_on_sharded_weights_keep_their_reference(storage: Storage) -> None:
    base = make_base(storage)
    fields = {"lora": False, "n_epochs": 1, "batch_size": 5, "validation_key": "files/pairs", "num_workers": 2}
    data, fsdp = (make_dpo_spec(storage, base, parallel=parallel, **fields) for parallel in ("data", "fsdp"))
    for ours, theirs in zip(train(storage, fsdp, "runs/fsdp"), train(storage, data, "runs/data"), strict=True):
        assert {**ours, "kind": 0} == pytest.approx({**theirs, "kind": 0}, rel=1e-4, abs=1e-6)


def test_a_run_goes_on_with_another_number_of_workers(storage: Storage) -> None:
    base = make_base(storage)
    two = make_spec(storage, base, n_epochs=2, batch_size=6, checkpoint_interval=2, num_workers=2)
    one = two.model_copy(update={"num_workers": 1})
    whole = train(storage, two, "runs/one")
    cut_after(storage, two, "runs/one", 2)
    agree(train(storage, one, "runs/one"), whole[2:])
