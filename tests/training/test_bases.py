"""Importing bases: only whole, safe models that a method can start from get in, and their manifest proves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.training.labelled import BERT, write_encoder
from training.artifact import BrokenFolder, read_manifest, verify
from training.bases import BaseError, import_base
from training.model_shape import ModelShape
from training.storage import Storage

MODELS = Path(__file__).resolve().parents[2].parent / "shared" / "models"
pytestmark = pytest.mark.skipif(not MODELS.exists(), reason="real models are not here")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a small real model that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (MODELS / "stories260K").iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


def add(storage: Storage, source: Path | str, id: str = "base"):
    return import_base(storage, id=id, source=str(source), revision=None, progress=lambda line: None)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "architecture", "num_parameters", "max_context", "capabilities"),
    [
        ("stories260K", "LlamaForCausalLM", 260_032, 512, ("completions",)),
        ("stories3M", "LlamaForCausalLM", 3_148_224, 512, ("completions",)),
        ("cardputer-chat", "GPTNeoForCausalLM", 3_410_560, 256, ("completions", "chat")),
    ],
)
def test_real_models_are_imported_and_proved(
    storage: Storage, name: str, architecture: str, num_parameters: int, max_context: int, capabilities: tuple[str, ...]
) -> None:
    base = add(storage, MODELS / name)
    assert (base.architecture, base.max_context, base.capabilities) == (architecture, max_context, capabilities)
    assert base.num_parameters == num_parameters
    manifest = verify(storage, base.storage_key, base.manifest_hash)
    assert (manifest.kind, manifest.fingerprint.dtype) == ("base", "float32")
    assert base.storage_key == f"bases/{base.content_hash}"
    assert set(storage.list_names(base.storage_key)) == {*manifest.files, "manifest.json"}
    assert not {"SOURCE.txt", "LICENSE"} & set(manifest.files)


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_an_encoder_is_imported_and_embeds_as_it_is(storage: Storage, tmp_path: Path, architecture: str) -> None:
    folder = write_encoder(tmp_path / "encoder")
    change_json(folder / "config.json", architectures=[architecture])
    base = add(storage, folder)
    assert (base.architecture, base.max_context, base.capabilities) == (architecture, 64, ("embed",))
    assert ModelShape(Path(storage.path(base.storage_key))).methods() == ("classification", "embedding")
    verify(storage, base.storage_key, base.manifest_hash)


def test_positions_that_padding_takes_are_no_context(storage: Storage, tmp_path: Path) -> None:
    changes = {"model_type": "roberta", "max_position_embeddings": 66, "pad_token_id": 1}
    folder = write_encoder(tmp_path / "encoder", {**BERT, **changes})
    change_json(folder / "tokenizer_config.json", model_max_length=10**30)
    assert add(storage, folder).max_context == 64


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("BertForQuestionAnswering", {}), ("BertLMHeadModel", {}), ("BertModel", {"is_decoder": True})],
)
def test_encoders_with_other_heads_and_decoders_are_refused(
    storage: Storage, tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    folder = write_encoder(tmp_path / "encoder")
    change_json(folder / "config.json", architectures=[architecture], **changes)
    with pytest.raises(BaseError, match=rf"config\.json names {architecture} of the type bert; bases can be"):
        add(storage, folder)


def test_pickled_weights_of_an_encoder_are_refused_by_name(storage: Storage, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "encoder")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseError, match=r"pytorch_model\.bin: convert to safetensors"):
        add(storage, folder)


def test_the_same_content_twice_changes_nothing(storage: Storage, model: Path) -> None:
    first = add(storage, model)
    written = Path(storage.path(f"{first.storage_key}/manifest.json"))
    before = written.stat().st_mtime_ns
    (model / "notes.txt").write_text("not part of the model")
    assert add(storage, model, id="another-name") == first
    assert written.stat().st_mtime_ns == before


def test_another_template_is_other_content(storage: Storage, model: Path) -> None:
    first = add(storage, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    second = add(storage, model)
    assert second.content_hash != first.content_hash
    assert second.fingerprint.chat_template != first.fingerprint.chat_template
    assert second.capabilities == ("completions", "chat")


def test_an_import_that_was_cut_off_is_not_a_base_and_is_completed_next_time(storage: Storage, model: Path) -> None:
    base = add(storage, model)
    storage.delete(f"{base.storage_key}/manifest.json")
    storage.write_bytes(f"{base.storage_key}/model.safetensors", b"half")
    assert read_manifest(storage, base.storage_key) is None
    assert add(storage, model) == base
    verify(storage, base.storage_key, base.manifest_hash)


def test_damaged_storage_is_found(storage: Storage, model: Path) -> None:
    base = add(storage, model)
    storage.write_bytes(f"{base.storage_key}/config.json", b"{}")
    with pytest.raises(BrokenFolder, match=r"config\.json"):
        verify(storage, base.storage_key, base.manifest_hash)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_by_name(storage: Storage, model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(BaseError, match=f"{name}: convert to safetensors"):
        add(storage, model)


def test_code_of_the_base_is_refused(storage: Storage, model: Path) -> None:
    change_json(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    with pytest.raises(BaseError, match="auto_map"):
        add(storage, model)


def test_a_missing_tokenizer_says_how_to_make_it(storage: Storage, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(BaseError, match="save_pretrained"):
        add(storage, model)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "T5ForConditionalGeneration", "LlamaForSequenceClassification"])
def test_other_than_causal_language_models_are_refused(storage: Storage, model: Path, name: str) -> None:
    change_json(model / "config.json", architectures=[name])
    with pytest.raises(BaseError, match=name):
        add(storage, model)


def test_links_out_of_the_folder_are_refused(storage: Storage, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(BaseError, match="leads out of the folder"):
        add(storage, model)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "weights.bin"])
def test_an_index_that_points_elsewhere_is_refused(storage: Storage, model: Path, name: str) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BaseError, match="inside the folder"):
        add(storage, model)


def test_sharded_weights_are_counted_and_kept(storage: Storage, model: Path) -> None:
    names = {"a": "model-00001-of-00001.safetensors"}
    (model / "model.safetensors").rename(model / names["a"])
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    base = add(storage, model)
    assert base.num_parameters == 260_032
    assert names["a"] in storage.list_names(base.storage_key)


def test_weights_cut_short_are_refused(storage: Storage, model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(BaseError, match="not a whole safetensors file"):
        add(storage, model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_broken_json_is_named(storage: Storage, model: Path, name: str) -> None:
    (model / name).write_text('{"cut')
    with pytest.raises(BaseError, match=name):
        add(storage, model)


def test_a_tokenizer_beyond_the_embedding_is_refused(storage: Storage, model: Path) -> None:
    change_json(model / "config.json", vocab_size=500)
    with pytest.raises(BaseError, match="the model knows 500 tokens"):
        add(storage, model)


def test_a_folder_that_is_not_there_is_said_so(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="not a folder"):
        add(storage, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseError, match="no files"):
        add(storage, tmp_path / "empty")
