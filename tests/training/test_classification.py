"""Classifiers against transformers' own, what their artifacts hold, and what planning says of labels."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from tests.training.labelled import BERT, LABELS, labelled_rows, make_encoder, make_labelled_spec, write_labelled
from tests.training.runs import BASE_KEY, GPT_NEO, LLAMA, Recorder, make_base, make_spec
from training import auto
from training.attention import PACKED
from training.batches import Batches, collate
from training.build import build_model
from training.classifier import label_config, load_classifier
from training.examples import load_examples
from training.loop import run
from training.methods.classification import loss_sums
from training.model_shape import _CAUSAL_WITH_LABELS, ENCODERS, ModelShape
from training.plan import PlanError, plan
from training.progress import EvalMetrics, Message, StepMetrics
from training.spec import ClassificationSpec, Hyperparameters, LoraSpec, TrainSpec
from training.storage import Storage

CPU = torch.device("cpu")
CAUSAL = {name: value for name, value in LLAMA.items() if name != "model_type"}
OF_TYPE: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("bert", "electra")},
    **{name: {"pad_token_id": 1, "max_position_embeddings": 66} for name in ("roberta", "xlm-roberta", "camembert")},
    "mpnet": {"pad_token_id": 1, "max_position_embeddings": 66},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0},
    "modernbert": {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "albert": {"embedding_size": 16, "classifier_dropout_prob": 0.0},
    "deberta-v2": {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def padded(rows: dict[str, list[Any]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    texts = [torch.tensor(ids) for ids in rows["input_ids"]]
    lengths = torch.tensor([len(ids) for ids in texts])
    ids = pad_sequence(texts, batch_first=True, padding_value=pad)
    return ids, (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()


def base_of_type(storage: Storage, model_type: str) -> Any:
    if model_type in ENCODERS:
        return make_encoder(storage, {**BERT, "model_type": model_type, **OF_TYPE[model_type]})
    return make_base(storage, {**CAUSAL, **causal_fields(model_type), "model_type": model_type})


def causal_fields(model_type: str) -> dict[str, Any]:
    special = {"gpt_neo": GPT_NEO, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}
    return {"head_dim": 8, **special.get(model_type, {})}


@pytest.mark.parametrize("model_type", sorted(ENCODERS | _CAUSAL_WITH_LABELS))
def test_every_type_gives_the_logits_and_gradients_of_transformers(storage: Storage, model_type: str) -> None:
    spec = make_labelled_spec(storage, base_of_type(storage, model_type))
    folder = Path(storage.path(BASE_KEY))
    examples, _ = load_examples(spec, storage)
    model, new = load_classifier(folder, LABELS, 3, torch.float32, CPU)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, **label_config(LABELS), dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.config.pad_token_id = model.config.pad_token_id
    rows = examples[list(range(12))]
    ids, mask = padded(rows, model.config.pad_token_id)
    found = loss_sums(spec, model.eval(), collate(rows))
    expected = plain.eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found.logits, expected.detach(), rtol=1e-4, atol=1e-5)
    found.loss.backward()
    cross_entropy(expected, torch.tensor(rows["label"]), reduction="sum").backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None and theirs.grad.abs().max() > 0:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert {"classifier", "score"} & set(new) <= set(new) <= {"classifier", "score", "pre_classifier", "head", "pooler"}
    assert "classification" in ModelShape(folder).methods()


def test_fp32_losses_of_50_steps_are_those_of_a_plain_loop(storage: Storage, tmp_path: Path) -> None:
    base = make_encoder(storage)
    rows = write_labelled(storage, "files/many", labelled_rows(200))
    changes = {"n_epochs": 1, "learning_rate": 1e-3, "warmup_ratio": 0.0, "checkpoint_interval": 50}
    spec = make_labelled_spec(storage, base, training_key=rows, **changes)
    channel = Recorder()
    assert run(spec, storage, "runs/one", channel, tmp_path).status == "finished"
    ours = [item.train_loss for item in channel.of(StepMetrics)]
    assert len(ours) == 50
    assert ours == pytest.approx(plain_losses(spec, storage), rel=1e-4)


def plain_losses(spec: TrainSpec, storage: Storage) -> list[float]:
    """Padded batches, transformers' model, attention and loss, torch's AdamW and clipping; our batches and head."""
    examples, _ = load_examples(spec, storage)
    batches = Batches(examples, batch_size=4, n_epochs=1, seed=spec.seed)
    torch.manual_seed(spec.seed)
    folder = Path(storage.path(BASE_KEY))
    model = AutoModelForSequenceClassification.from_pretrained(folder, **label_config(LABELS)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, batches.total_steps)
    losses = []
    for step in range(1, batches.total_steps + 1):
        rows = examples[batches.indices(step)]
        ids, mask = padded(rows)
        loss = model(input_ids=ids, attention_mask=mask, labels=torch.tensor(rows["label"])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("class_weights", "weights"),
    [
        ("none", [1.0, 1.0, 1.0]),
        ("sqrt", [10 / ((4**0.5 + 3**0.5 + 3**0.5) * count**0.5) for count in (4, 3, 3)]),
        ("balanced", [10 / (3 * 4), 10 / (3 * 3), 10 / (3 * 3)]),
    ],
)
def test_weights_and_smoothing_are_those_of_torch_over_the_number_of_texts(
    storage: Storage, class_weights: str, weights: list[float]
) -> None:
    rows = write_labelled(storage, "files/ten", labelled_rows(10))
    settings = {"class_weights": class_weights, "label_smoothing": 0.1, "label_counts": (4, 3, 3)}
    spec = make_labelled_spec(storage, make_encoder(storage), settings=settings, training_key=rows)
    examples, _ = load_examples(spec, storage)
    model = build_model(spec, Path(storage.path(BASE_KEY)), None, torch.float32, CPU).eval()
    found = loss_sums(spec, model, collate(examples[list(range(10))]))
    assert found.logits is not None
    weight = torch.tensor(weights)
    labels = torch.tensor(list(examples["label"]))
    expected = cross_entropy(found.logits, labels, weight=weight, label_smoothing=0.1, reduction="sum")
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.num_counted == 10


@pytest.mark.parametrize(
    ("model", "precision"),
    [(BERT, "fp32"), (BERT, "bf16"), (LLAMA, "fp32"), (GPT_NEO, "fp32")],
    ids=["bert", "bert-bf16", "llama", "gpt-neo"],
)
def test_a_full_artifact_is_a_classifier_of_transformers(
    storage: Storage, tmp_path: Path, model: dict[str, Any], precision: str
) -> None:
    base = make_encoder(storage, model) if model is BERT else make_base(storage, model)
    valid = write_labelled(storage, "files/valid", labelled_rows(20, first=100))
    changes = {"validation_key": valid, "n_epochs": 8, "learning_rate": 3e-3, "eval_interval": 8}
    spec = make_labelled_spec(storage, base, precision=precision, max_length=128, **changes)
    channel = Recorder()
    assert run(spec, storage, "runs/one", channel, tmp_path).status == "finished"
    folder = storage.local_folder("runs/one/artifact")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert loaded.config.label2id == {label: number for number, label in enumerate(LABELS)}
    assert loaded.config.problem_type == "single_label_classification"
    rows = labelled_rows(20, first=100)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        numbers = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    right = [LABELS[number] == row["label"] for number, row in zip(numbers.tolist(), rows, strict=True)]
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["accuracy"] == pytest.approx(sum(right) / 20, abs=0.051 if precision == "bf16" else 1e-6)
    best = min(channel.of(EvalMetrics), key=lambda item: item.valid_loss)
    assert report["accuracy"] == pytest.approx(best.valid_mean_token_accuracy)
    assert report["num_examples"] == 20
    assert report["temperature"] > 0
    assert any(item.text.startswith(f"Validation: accuracy {report['accuracy']:.3f}") for item in channel.of(Message))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "albert", "llama"])
def test_an_adapter_with_its_head_is_loaded_by_peft(storage: Storage, tmp_path: Path, model_type: str) -> None:
    base = base_of_type(storage, model_type)
    changes = {"validation_key": "files/labelled", "n_epochs": 20, "learning_rate": 0.01, "eval_interval": 60}
    changes |= {"checkpoint_interval": 60}
    spec = make_labelled_spec(storage, base, lora=True, **changes)
    assert run(spec, storage, "runs/one", Recorder(), tmp_path).status == "finished"
    folder, base_folder = storage.local_folder("runs/one/artifact"), Path(storage.path(BASE_KEY))
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_CLS"
    assert adapter["modules_to_save"]
    plain = AutoModelForSequenceClassification.from_pretrained(base_folder, **label_config(LABELS))
    plain.config.pad_token_id = json.loads((folder / "config.json").read_text())["pad_token_id"]
    loaded = PeftModel.from_pretrained(plain, folder).eval()
    examples, _ = load_examples(spec, storage)
    rows = examples[list(range(12))]
    ids, mask = padded(rows, plain.config.pad_token_id)
    with torch.no_grad():
        logits = loaded(input_ids=ids, attention_mask=mask).logits
    loss = cross_entropy(logits, torch.tensor(rows["label"])).item()
    state = json.loads((storage.local_folder("runs/one/checkpoints/step-000060") / "trainer_state.json").read_text())
    assert loss == pytest.approx(state["curve"]["best_loss"], rel=1e-3)
    assert loss < 0.5, "it has learned, head and all"


def test_a_bf16_adapter_trains_its_new_head_in_fp32(storage: Storage, tmp_path: Path) -> None:
    spec = make_labelled_spec(
        storage, make_encoder(storage), lora=True, precision="bf16", n_epochs=10, checkpoint_interval=30
    )
    channel = Recorder()
    assert run(spec, storage, "runs/one", channel, tmp_path).status == "finished"
    steps = channel.of(StepMetrics)
    assert steps[-1].train_loss < 0.5 * steps[0].train_loss


def test_packing_is_used_where_the_architecture_allows_it(storage: Storage, tmp_path: Path) -> None:
    other = Storage(str(tmp_path / "other"))
    make_encoder(storage)
    base_of_type(other, "modernbert")
    packed, padded_ = (
        load_classifier(Path(s.path(BASE_KEY)), LABELS, 0, torch.float32, CPU)[0] for s in (storage, other)
    )
    assert packed.config._attn_implementation == PACKED
    assert padded_.config._attn_implementation != PACKED


def test_a_base_without_weights_of_its_own_is_refused(storage: Storage, tmp_path: Path) -> None:
    spec = make_labelled_spec(storage, make_encoder(storage))
    file = Path(storage.path(BASE_KEY)) / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    outcome = run(spec, storage, "runs/one", Recorder(), tmp_path)
    assert (outcome.status, outcome.code) == ("failed", "invalid_base_model")
    assert "encoder.layer.1.output.dense.weight" in (outcome.message or "")


# -- planning ----------------------------------------------------------------------------------------------------------


def asked(storage: Storage, base: Any, rows: list[dict[str, str]], **changes: Any) -> TrainSpec:
    """A spec with everything on auto."""
    key = write_labelled(storage, "files/asked", rows)
    fields = {"adapter": None, "classification": ClassificationSpec(), **changes}
    return TrainSpec(base=base, method="classification", training_key=key, **fields)


def test_auto_becomes_numbers_and_labels_are_found(storage: Storage) -> None:
    spec = asked(storage, make_encoder(storage), labelled_rows(40), validation_split=0.25)
    made = plan(spec, storage)
    assert made.spec.unresolved() == []
    assert plan(made.spec, storage) == made
    settings = made.spec.classification
    assert settings is not None
    assert settings.labels == LABELS
    train, valid = load_examples(made.spec, storage)
    assert valid is not None
    assert settings.label_counts == tuple(train["label"].count(number) for number in range(3))
    assert (made.num_examples, made.num_validation_examples) == (30, 10)
    assert made.num_trained_tokens == sum(sum(row["trained"]) for row in train) == made.num_tokens - 30
    assert made.warnings == []


def refused(storage: Storage, spec: TrainSpec) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan(spec, storage)
    return caught.value


def test_labels_that_only_the_validation_file_has_are_refused_by_line(storage: Storage) -> None:
    rows = [*labelled_rows(4), {"text": "the fish sleeps", "label": "fish"}]
    valid = write_labelled(storage, "files/valid", rows)
    error = refused(storage, asked(storage, make_encoder(storage), labelled_rows(), validation_key=valid))
    assert (error.code, error.param) == ("invalid_validation_file", "validation_file")
    assert 'line 5: no record of the training file has the label "fish"' in error.message


def test_one_label_alone_is_refused_and_so_are_more_than_a_thousand(storage: Storage) -> None:
    base = make_encoder(storage)
    error = refused(storage, asked(storage, base, [{"text": f"cat {i}", "label": "cat"} for i in range(12)]))
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert 'every record has the label "cat"' in error.message
    error = refused(storage, asked(storage, base, [{"text": "cat", "label": f"c{i}"} for i in range(1001)]))
    assert "1001 different labels" in error.message


def test_a_label_with_a_single_text_is_a_warning(storage: Storage) -> None:
    rows = [*labelled_rows(20), {"text": "a fish", "label": "fish"}]
    base = make_encoder(storage)
    unmeasured, single = plan(asked(storage, base, rows), storage).warnings
    assert "validation_split" in unmeasured
    assert single == 'These labels have one training text only: "fish".'
    seeds = (asked(storage, base, rows, validation_split=0.5, seed=seed) for seed in range(20))
    warnings = {warning for spec in seeds for warning in plan(spec, storage).warnings if "held out" in warning}
    assert warnings == {
        'All texts of these labels were held out for validation, so the model cannot learn them: "fish".'
    }


def test_a_text_longer_than_the_context_is_refused_by_line(storage: Storage) -> None:
    rows = labelled_rows(12)
    rows[6]["text"] = "cat " * 80
    error = refused(storage, asked(storage, make_encoder(storage), rows))
    assert "line 7: 82 tokens, and at most 64 are allowed" in error.message


def test_a_base_that_cannot_do_the_method_is_refused(storage: Storage, tmp_path: Path) -> None:
    error = refused(storage, make_spec(storage, make_encoder(storage), max_length=64))
    assert (error.code, error.param) == ("invalid_base_model", "model")
    assert "it can be fine-tuned by classification" in error.message
    other = Storage(str(tmp_path / "other"))
    base = make_base(other, {**LLAMA, "model_type": "granite"})
    error = refused(other, asked(other, base, labelled_rows()))
    assert (error.code, error.param) == ("invalid_base_model", "model")


@pytest.mark.parametrize(
    ("method", "row", "words"),
    [
        (
            "classification",
            {"text": "a cat"},
            "a text record, and the method classification learns from classification",
        ),
        ("supervised", {"text": "a cat", "label": "cat"}, "a classification record, and the method supervised learns"),
    ],
)
def test_rows_of_another_method_are_refused(storage: Storage, method: str, row: dict[str, str], words: str) -> None:
    changes: dict[str, Any] = {} if method == "classification" else {"method": method, "classification": None}
    spec = asked(storage, make_base(storage), [row] * 12).model_copy(update=changes)
    error = refused(storage, spec)
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert f"line 1: {words}" in error.message


def test_the_rules_of_auto_for_classifiers() -> None:
    rate = partial(auto.learning_rate, method="classification")
    assert [rate(width, lora=False) for width in (32, 384, 768, 4096)] == [5e-4, 3e-4, 7.5e-5, 1e-5]
    assert rate(384, lora=True) == auto.learning_rate(384, lora=True)
    epochs = partial(auto.n_epochs, method="classification")
    assert [epochs(count, num_labels=2) for count in (10, 500, 2000, 4137, 1_000_000)] == [10, 10, 6, 3, 3]
    assert [epochs(count, num_labels=77) for count in (10_003, 1_000_000)] == [5, 3]
    assert [auto.batch_size(count, 1, "classification") for count in (12, 500, 10_003)] == [6, 15, 32]
    assert [auto.precision(count, "classification") for count in (1_000_000, 22_000_000)] == ["fp32", "bf16"]


def test_lora_cannot_take_a_part_of_the_new_head(storage: Storage) -> None:
    adapter = LoraSpec(rank=4, alpha=8.0, targets=("query", "classifier"))
    error = refused(storage, asked(storage, make_encoder(storage), labelled_rows(), adapter=adapter))
    assert (error.code, error.param) == ("invalid_value", "adapter.targets")


def test_given_hyperparameters_stay(storage: Storage) -> None:
    spec = asked(
        storage,
        make_encoder(storage),
        labelled_rows(),
        classification=ClassificationSpec(class_weights="balanced", label_smoothing=0.05),
        hyperparameters=Hyperparameters(learning_rate_multiplier=2.0, n_epochs=7),
    )
    made = plan(spec, storage).spec
    assert made.classification == ClassificationSpec(
        class_weights="balanced", label_smoothing=0.05, labels=LABELS, label_counts=(4, 4, 4)
    )
    assert (made.hyperparameters.n_epochs, made.hyperparameters.learning_rate) == (7, 1e-3)
