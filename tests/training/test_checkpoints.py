"""Checkpoints: complete or invisible, servable, free of pickle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.runs import BASE_KEY, Recorder, make_base, make_spec
from training.artifact import MANIFEST, canonical_json, verify
from training.loop import run
from training.progress import CheckpointSaved, Message, StepMetrics, Wish
from training.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_checkpoint_serves_like_an_artifact(storage: Storage, tmp_path: Path, lora: bool) -> None:
    spec = make_spec(storage, make_base(storage), lora, n_epochs=2)
    channel = Recorder()
    run(spec, storage, "runs/one", channel, tmp_path / "scratch")
    saved = channel.of(CheckpointSaved)[-1]
    manifest = verify(storage, saved.key, saved.manifest_hash)
    assert (manifest.kind, manifest.step, manifest.spec) == ("checkpoint", 6, spec)
    folder, base = storage.local_folder(saved.key), storage.local_folder(BASE_KEY)
    assert AutoTokenizer.from_pretrained(folder).chat_template == (base / "chat_template.jinja").read_text()
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".jinja"}
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    artifact = storage.local_folder("runs/one/artifact")
    assert (folder / name).read_bytes() == (artifact / name).read_bytes()
    if lora:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    else:
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_half_written_checkpoint_is_ignored_and_written_anew(storage: Storage, tmp_path: Path) -> None:
    base = make_base(storage)
    whole, broken = Recorder(), Recorder()
    spec = make_spec(storage, base)
    run(spec, storage, "runs/whole", whole, tmp_path)
    run(spec, storage, "runs/one", Recorder(), tmp_path)
    storage.delete("runs/one/artifact")
    for step in ("step-000010", "step-000012"):
        storage.delete(f"runs/one/checkpoints/{step}/{MANIFEST}")
    storage.write_bytes("runs/one/checkpoints/step-000010/optimizer.safetensors", b"torn")
    storage.write_bytes("runs/one/checkpoints/step-000010/left-over", b"?")
    run(spec, storage, "runs/one", broken, tmp_path)
    assert [item.step for item in broken.of(StepMetrics)] == list(range(6, 13))
    assert [item.step for item in broken.of(CheckpointSaved)] == [5, 10, 12], "the known one is said again"
    assert [c.manifest_hash for c in broken.of(CheckpointSaved)] == [c.manifest_hash for c in whole.of(CheckpointSaved)]


def test_a_run_killed_before_its_artifact_only_exports(storage: Storage, tmp_path: Path) -> None:
    spec = make_spec(storage, make_base(storage), n_epochs=2)
    run(spec, storage, "runs/one", Recorder(), tmp_path)
    expected = load_file(storage.local_folder("runs/one/artifact") / "adapter_model.safetensors")
    storage.delete("runs/one/artifact")
    again = Recorder()
    assert run(spec, storage, "runs/one", again, tmp_path).status == "finished"
    assert not again.of(StepMetrics)
    found = load_file(storage.local_folder("runs/one/artifact") / "adapter_model.safetensors")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_a_folder_of_a_version_without_newer_fields_keeps_its_hash(storage: Storage, tmp_path: Path) -> None:
    run(make_spec(storage, make_base(storage), n_epochs=1), storage, "runs/one", Recorder(), tmp_path)
    old = json.loads(storage.read_bytes(f"runs/one/artifact/{MANIFEST}"))
    del old["last_step"]
    assert "early_stopping" not in old["spec"]
    stored = canonical_json(old)
    storage.write_bytes(f"runs/one/artifact/{MANIFEST}", stored)
    assert verify(storage, "runs/one/artifact", hashlib.sha256(stored).hexdigest()).last_step is None


def test_checkpoints_of_another_spec_are_refused(storage: Storage, tmp_path: Path) -> None:
    base = make_base(storage)
    stop = Recorder(Wish.CHECKPOINT_AND_STOP, at_step=1)
    run(make_spec(storage, base), storage, "runs/one", stop, tmp_path)
    other = make_spec(storage, base, seed=5)
    channel = Recorder()
    assert run(other, storage, "runs/one", channel, tmp_path).code == "checkpoint_mismatch"
    assert not channel.of(Message)
