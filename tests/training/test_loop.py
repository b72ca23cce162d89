"""What a run says, writes and obeys; how it fails."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.training.runs import BASE_KEY, GPT_NEO, LLAMA, Recorder, make_base, make_spec, write_rows
from training.artifact import read_manifest, verify
from training.divergence import NUM_STEPS
from training.loop import Outcome, run
from training.model_shape import ModelShape
from training.progress import (
    ArtifactWritten,
    CheckpointDeleted,
    CheckpointSaved,
    EvalMetrics,
    Failed,
    Message,
    ProgressItem,
    StepMetrics,
    Stopped,
    Wish,
)
from training.reporter import OwnerLost, Reporter
from training.spec import LoraSpec
from training.storage import Storage

STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260K"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def losses(channel: Recorder) -> list[float]:
    return [item.train_loss for item in channel.of(StepMetrics)]


def test_a_run_reports_every_step_and_leaves_a_verified_artifact(storage: Storage, tmp_path: Path) -> None:
    spec = make_spec(storage, make_base(storage), validation_key=write_rows(storage, "files/valid", 3, first=50))
    channel = Recorder()
    outcome = run(spec, storage, "runs/one", channel, tmp_path / "scratch")
    assert outcome == Outcome("finished", 12)
    assert [item.seq for item in channel.items] == list(range(len(channel.items)))
    assert [item.step for item in channel.of(StepMetrics)] == list(range(1, 13))
    assert losses(channel)[-1] < losses(channel)[0]
    assert [item.step for item in channel.of(EvalMetrics)] == [5, 10, 12]
    assert [item.step for item in channel.of(CheckpointSaved)] == [5, 10, 12]
    (artifact,) = channel.of(ArtifactWritten)
    manifest = verify(storage, artifact.key, artifact.manifest_hash)
    assert (manifest.kind, manifest.step, manifest.spec) == ("adapter", 12, spec)
    assert {"tokenizer.json", "chat_template.jinja", "adapter_model.safetensors"} <= manifest.files.keys()


def test_a_finished_run_says_so_again_without_training(storage: Storage, tmp_path: Path) -> None:
    spec = make_spec(storage, make_base(storage))
    first, second = Recorder(), Recorder()
    run(spec, storage, "runs/one", first, tmp_path)
    assert run(spec, storage, "runs/one", second, tmp_path).status == "finished"
    assert not second.of(StepMetrics)
    assert second.of(ArtifactWritten)[0].manifest_hash == first.of(ArtifactWritten)[0].manifest_hash


@pytest.mark.parametrize(
    ("model", "lora", "precision"),
    [(LLAMA, True, "bf16"), (LLAMA, False, "bf16"), (GPT_NEO, True, "fp32"), (GPT_NEO, False, "bf16")],
    ids=["llama-lora-bf16", "llama-full-bf16", "gpt_neo-lora-fp32", "gpt_neo-full-bf16"],
)
def test_it_learns(storage: Storage, tmp_path: Path, model: dict[str, Any], lora: bool, precision: str) -> None:
    base = make_base(storage, model)
    spec = make_spec(storage, base, lora, precision=precision, n_epochs=6, learning_rate=0.02, checkpoint_interval=50)
    channel = Recorder()
    assert run(spec, storage, "runs/one", channel, tmp_path).status == "finished"
    assert losses(channel)[-1] < losses(channel)[0] * 0.6


def test_accumulation_changes_no_loss(storage: Storage, tmp_path: Path) -> None:
    base = make_base(storage)
    runs = []
    for parts in (1, 3):
        channel = Recorder()
        run(make_spec(storage, base, gradient_accumulation_steps=parts), storage, f"runs/{parts}", channel, tmp_path)
        runs.append(losses(channel))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_full_weights_keep_the_dtype_of_the_base_and_load_anywhere(storage: Storage, tmp_path: Path) -> None:
    spec = make_spec(storage, make_base(storage, dtype=torch.bfloat16), lora=False, precision="bf16")
    run(spec, storage, "runs/one", Recorder(), tmp_path)
    folder = storage.local_folder("runs/one/artifact")
    weights = load_file(folder / "model.safetensors")
    before = load_file(storage.local_folder(BASE_KEY) / "model.safetensors")
    assert weights.keys() == before.keys()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert any(not torch.equal(weights[name], before[name]) for name in weights)
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    manifest = read_manifest(storage, "runs/one/artifact")
    assert manifest is not None
    assert manifest.fingerprint.dtype == "bfloat16"


def test_checkpoint_and_stop_leaves_a_checkpoint_of_exactly_that_step(storage: Storage, tmp_path: Path) -> None:
    spec = make_spec(storage, make_base(storage), n_epochs=50)
    channel = Recorder(Wish.CHECKPOINT_AND_STOP, at_step=2)
    outcome = run(spec, storage, "runs/one", channel, tmp_path)
    (stopped,) = channel.of(Stopped)
    assert outcome == Outcome("stopped", stopped.step, wish=Wish.CHECKPOINT_AND_STOP)
    assert channel.of(CheckpointSaved)[-1].step == stopped.step == channel.of(StepMetrics)[-1].step
    assert not channel.of(ArtifactWritten)


def test_cancel_stops_without_a_checkpoint(storage: Storage, tmp_path: Path) -> None:
    spec = make_spec(storage, make_base(storage), n_epochs=50, checkpoint_interval=1000)
    channel = Recorder(Wish.CANCEL, at_step=1)
    assert run(spec, storage, "runs/one", channel, tmp_path).wish is Wish.CANCEL
    assert channel.of(Stopped)[0].wish is Wish.CANCEL
    assert not channel.of(CheckpointSaved)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_gpt2_is_trained_though_its_layers_are_of_another_kind(storage: Storage, tmp_path: Path, lora: bool) -> None:
    """Its class is no …ForCausalLM, and its weights lie transposed."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    base = make_base(storage, {"model_type": "gpt2", **sizes})
    assert "supervised" in ModelShape(storage.local_folder(BASE_KEY)).methods()
    channel = Recorder()
    assert run(make_spec(storage, base, lora, n_epochs=3), storage, "runs/one", channel, tmp_path).status == "finished"
    losses = [item.train_loss for item in channel.of(StepMetrics)]
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_stops_before_the_step(storage: Storage, tmp_path: Path) -> None:
    spec = make_spec(storage, make_base(storage))
    run(spec, storage, "runs/one", Recorder(Wish.CHECKPOINT_AND_STOP, at_step=2), tmp_path)
    file = storage.local_folder(BASE_KEY) / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    kept = Recorder()
    outcome = run(spec, storage, "runs/one", kept, tmp_path)
    assert outcome.code == "loss_not_finite"
    (failed,) = kept.of(Failed)
    assert "learning_rate" in failed.message
    assert "is kept" in failed.message
    assert not kept.of(StepMetrics)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_rate_that_diverges_ends_with_the_last_good_checkpoint(storage: Storage, tmp_path: Path, lora: bool) -> None:
    """The first step at full rate is finite and applied; what the next one reads is not."""
    spec = make_spec(storage, make_base(storage), lora, learning_rate=1e30, warmup_ratio=0.0, checkpoint_interval=1)
    channel = Recorder()
    outcome = run(spec, storage, "runs/one", channel, tmp_path)
    assert (outcome.status, outcome.code) == ("failed", "loss_not_finite")
    (failed,) = channel.of(Failed)
    assert failed.param == "method.supervised.hyperparameters.learning_rate"
    assert f"the step was not applied. The checkpoint of step {outcome.step - 1} is kept" in failed.message
    assert [item.step for item in channel.of(CheckpointSaved)] == [item.step for item in channel.of(StepMetrics)]


def test_a_loss_that_rises_far_above_its_start_and_stays_there_ends_the_run(storage: Storage, tmp_path: Path) -> None:
    """All numbers are finite: a rate far too high for the model drives it away for good."""
    fields = {"n_epochs": 20, "batch_size": 2, "warmup_ratio": 0.0, "checkpoint_interval": 1, "keep_checkpoints": 2}
    spec = make_spec(storage, make_base(storage), False, learning_rate=3.0, **fields)
    whole = Recorder()
    outcome = run(spec, storage, "runs/one", whole, tmp_path)
    assert (outcome.status, outcome.code) == ("failed", "loss_diverged")
    (failed,) = whole.of(Failed)
    assert failed.param == "method.supervised.hyperparameters.learning_rate"
    first = whole.of(StepMetrics)[0].train_loss
    assert f"was {first:.4g} at the first step" in failed.message
    (good,) = re.findall(r"The checkpoint of step (\d+) is kept", failed.message)
    assert int(good) <= outcome.step - NUM_STEPS, "older than the last two, which the loss has spoilt"
    assert read_manifest(storage, f"runs/one/checkpoints/step-{int(good):06d}") is not None

    stopped = Recorder(Wish.CHECKPOINT_AND_STOP, at_step=outcome.step - 3)
    run(spec, storage, "runs/two", stopped, tmp_path)
    resumed = run(spec, storage, "runs/two", Recorder(), tmp_path)
    assert (resumed.code, resumed.step) == (outcome.code, outcome.step), "a resumed run decides as a whole one"


def test_a_validation_loss_that_is_not_finite_ends_the_run_and_makes_no_checkpoint(
    storage: Storage, tmp_path: Path
) -> None:
    """Evaluated right after the step that broke the weights: they may not become the best checkpoint."""
    fields = {"eval_interval": 1, "checkpoint_interval": 1, "validation_key": write_rows(storage, "files/valid", 4)}
    spec = make_spec(storage, make_base(storage), learning_rate=1e30, warmup_ratio=0.0, **fields)
    channel = Recorder()
    outcome = run(spec, storage, "runs/one", channel, tmp_path)
    assert (outcome.code, outcome.step) == ("loss_not_finite", 1)
    (failed,) = channel.of(Failed)
    assert "the validation loss is nan" in failed.message
    assert not channel.of(EvalMetrics)
    assert not channel.of(CheckpointSaved)
    assert storage.list_names("runs/one/checkpoints") == []


def test_a_lora_target_that_does_not_exist_is_a_failure_that_names_the_layers(storage: Storage, tmp_path: Path) -> None:
    adapter = LoraSpec(rank=2, alpha=4.0, targets=("q_projection",))
    outcome = run(make_spec(storage, make_base(storage), adapter=adapter), storage, "runs/one", Recorder(), tmp_path)
    assert outcome.code == "invalid_lora_target"
    assert "q_proj" in (outcome.message or "")


def test_old_checkpoints_are_deleted_and_said_so(storage: Storage, tmp_path: Path) -> None:
    spec = make_spec(storage, make_base(storage), checkpoint_interval=2, keep_checkpoints=2)
    channel = Recorder()
    run(spec, storage, "runs/one", channel, tmp_path)
    assert [item.step for item in channel.of(CheckpointDeleted)] == [2, 4, 6, 8]
    assert storage.list_names("runs/one/checkpoints") == ["step-000010", "step-000012"]


class Flaky(Recorder):
    """Fails until it has been asked a few times."""

    num_calls = 0

    def send(self, items: list[ProgressItem]) -> Wish:
        self.num_calls += 1
        if self.num_calls <= 3:
            raise ConnectionError("not now")
        return super().send(items)


def test_progress_survives_a_channel_that_fails_for_a_while_in_order() -> None:
    channel = Flaky()
    with Reporter(channel, interval_s=0.01) as reporter:
        for number in range(20):
            reporter.say(Message, text=str(number))
    assert [item.text for item in channel.of(Message)] == [str(number) for number in range(20)]


class Dead:
    """A channel whose owner is gone."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def send(self, items: list[ProgressItem]) -> Wish:
        self.asked.set()
        raise ConnectionError("gone")


def test_a_run_without_an_owner_does_not_train_on(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(OwnerLost):
        with Reporter(Dead(), interval_s=0.01, patience_s=0.05) as reporter:
            reporter.say(Message, text="hello")


def test_stories260k_learns_real_rows_from_its_own_tokenizer(storage: Storage, tmp_path: Path) -> None:
    if not STORIES.exists():
        pytest.skip("the shared models are not here")
    base = make_base(storage)
    folder = storage.local_folder(BASE_KEY)
    for file in STORIES.iterdir():
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").unlink()
    rows = [{"text": f"Once upon a time, there was a dragon called Number {i}."} for i in range(16)]
    storage.write_bytes("files/text", "\n".join(map(json.dumps, rows)).encode())
    spec = make_spec(storage, base, training_key="files/text")
    channel = Recorder()
    assert run(spec, storage, "runs/one", channel, tmp_path).status == "finished"
    assert losses(channel)[-1] < losses(channel)[0] * 0.5
