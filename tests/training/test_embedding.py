"""Contrastive tuning: the loss against a plain one, exact resume, and an artifact that serves what was trained."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, PreTrainedModel

from service.engine.encoder import EncoderEngine
from tests.engine.encoders import CONTEXT, ids_of, save_encoder
from tests.training.runs import LLAMA, Recorder, make_base
from tests.training.test_resume import check_ten_are_five_and_five
from training.bases import BaseError, import_base
from training.batches import collate
from training.embedder import load_embedder
from training.examples import ExamplesError, load_examples
from training.failure import Failure
from training.loop import run
from training.methods import embedding
from training.plan import PlanError, plan
from training.progress import EvalMetrics, StepMetrics
from training.records import PairRecord, RecordError, iter_records
from training.spec import BaseRef, EmbeddingSpec, Hyperparameters, LoraSpec, TrainSpec
from training.storage import Storage

WORDS = ["bill", "card", "refund", "app", "error", "love", "thanks", "working", "charged", "crashes", "slow", "great"]
CPU = torch.device("cpu")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def make_encoder(storage: Storage, tmp_path: Path, **options: Any) -> BaseRef:
    """A tiny encoder in sentence-transformers' layout, imported as any base."""
    folder = save_encoder(tmp_path / "encoder", **{"pooling": "mean_tokens", **options})
    found = import_base(storage, id="tiny", source=str(folder), revision=None, progress=lambda _: None)
    assert found.capabilities == ("embed",)
    return BaseRef(id="tiny", key=found.storage_key, content_hash=found.content_hash)


def write_pairs(storage: Storage, key: str, *, triplets: bool = False, num_rows: int = 12) -> str:
    """A word belongs to itself with other words around it; texts differ in length."""
    rows = []
    for i in range(num_rows):
        word, other = WORDS[i % len(WORDS)], WORDS[(i + 1) % len(WORDS)]
        row = {"anchor": f"my {word}", "positive": f"the {word} was {word}" + " it" * (i % 3)}
        rows.append(json.dumps({**row, "negative": f"is it the {other}?"} if triplets else row))
    storage.write_bytes(key, "\n".join(rows).encode())
    return key


def make_spec(
    storage: Storage, base: BaseRef, *, triplets: bool = False, lora: bool = False, **changes: Any
) -> TrainSpec:
    hyper: dict[str, Any] = {
        "n_epochs": 5,
        "batch_size": 6,
        "learning_rate_multiplier": 1.0,
        "learning_rate": 0.003,
        "gradient_accumulation_steps": 1,
        "max_length": CONTEXT,
    }
    hyper |= {name: changes.pop(name) for name in list(changes) if name in Hyperparameters.model_fields}
    fields: dict[str, Any] = {
        "base": base,
        "method": "embedding",
        "embedding": EmbeddingSpec(temperature=0.1),
        "training_key": write_pairs(storage, "files/pairs", triplets=triplets),
        "adapter": LoraSpec(rank=4, alpha=8.0) if lora else None,
        "precision": "fp32",
        "eval_interval": 5,
        "checkpoint_interval": 5,
    }
    return TrainSpec(hyperparameters=Hyperparameters(**hyper), **{**fields, **changes})


# -- the loss ----------------------------------------------------------------------------------------------------------


def plain_embedding(model: PreTrainedModel, text: str) -> torch.Tensor:
    return model(torch.tensor([ids_of(text)])).last_hidden_state[0].mean(dim=0)


def plain_losses(model: PreTrainedModel, rows: list[dict[str, str]], temperature: float) -> list[torch.Tensor]:
    """The formula of the docstring, written once more over texts."""
    losses = []
    for own, row in enumerate(rows):
        anchor = plain_embedding(model, row["anchor"])

        def score(text: str, anchor: torch.Tensor = anchor) -> torch.Tensor:
            return cosine_similarity(anchor, plain_embedding(model, text), dim=0) / temperature

        right = score(row["positive"])
        others = [r["positive"] for i, r in enumerate(rows) if i != own and r["anchor"] != row["anchor"]]
        others += [r["negative"] for r in rows if "negative" in r]
        others = [text for text in others if text not in (row["positive"], row["anchor"])]
        losses.append(torch.stack([right, *map(score, others)]).logsumexp(dim=0) - right)
    return losses


PAIRS = [
    {"anchor": "my bill", "positive": "the bill was charged twice"},
    {"anchor": "app crashes", "positive": "error error error"},
    {"anchor": "my bill", "positive": "refund"},  # another text for the same anchor
    {"anchor": "it is slow", "positive": "error error error"},  # another anchor for the same text
    {"anchor": "thanks", "positive": "my bill"},  # the anchor of others
]
NEGATIVES = ["great", "the bill was charged twice", "i love it", "my bill", "not working"]
TRIPLETS = [{**row, "negative": text} for row, text in zip(PAIRS, NEGATIVES, strict=True)]


@pytest.mark.parametrize("rows", [PAIRS, TRIPLETS], ids=["pairs", "triplets"])
def test_the_loss_is_info_nce_without_false_negatives(storage: Storage, tmp_path: Path, rows: Any) -> None:
    base = make_encoder(storage, tmp_path)
    storage.write_bytes("files/rows", "\n".join(map(json.dumps, rows)).encode())
    spec = make_spec(storage, base, training_key="files/rows")
    train, _ = load_examples(spec, storage, tmp_path / "examples")
    model = load_embedder(storage.local_folder(base.key), 0, torch.float32, CPU).eval()
    found = embedding.loss_sums(spec, model, collate(train[list(range(len(rows)))]))
    found.loss.backward()
    plain = AutoModel.from_pretrained(storage.local_folder(base.key)).eval()
    losses = torch.stack(plain_losses(plain, rows, 0.1))
    losses.sum().backward()
    assert found.num_counted == len(rows)
    torch.testing.assert_close(found.loss, losses.sum(), rtol=1e-4, atol=1e-5)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if theirs.grad is not None and ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_an_example_alone_in_its_micro_batch_has_nothing_to_learn_from(storage: Storage, tmp_path: Path) -> None:
    spec = make_spec(storage, make_encoder(storage, tmp_path))
    train, _ = load_examples(spec, storage, tmp_path / "examples")
    model = load_embedder(storage.local_folder(spec.base.key), 0, torch.float32, CPU).eval()
    assert embedding.loss_sums(spec, model, collate(train[[0]])).loss.item() == 0


def test_an_architecture_that_cannot_be_packed_gives_the_same_embeddings_padded(tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertModel

    from tests.engine.encoders import save_tokenizer
    from training.attention import PACKED
    from training.embedder import embeddings

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    AlbertModel(AlbertConfig(vocab_size=120, embedding_size=16, **sizes)).save_pretrained(
        save_tokenizer_at(tmp_path, save_tokenizer)
    )
    model = load_embedder(tmp_path, 0, torch.float32, CPU).eval()
    assert model.config._attn_implementation != PACKED
    texts = [ids_of("app"), ids_of("the card was charged twice"), ids_of("app crashes")]
    rows = {
        "input_ids": [list(sum(texts, ()))],
        "trained": [[True] * sum(map(len, texts))],
        "lengths": [list(map(len, texts))],
    }
    with torch.no_grad():
        found = embeddings(model, collate(rows))
        expected = torch.stack([model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0) for ids in texts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def save_tokenizer_at(folder: Path, save: Any) -> Path:
    folder.mkdir(exist_ok=True)
    made: Path = save(folder)
    return made


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"lora": True, "triplets": True},
        {"precision": "bf16", "weight_decay": 0.1},
    ],
    ids=["full-accumulation", "lora-triplets", "full-bf16"],
)
def test_ten_steps_are_five_and_five_more(storage: Storage, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also with the dropout that BERT has while it trains."""
    spec = make_spec(storage, make_encoder(storage, tmp_path), validation_key="files/pairs", **changes)
    check_ten_are_five_and_five(storage, spec, tmp_path)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_is_served_is_what_was_trained(storage: Storage, tmp_path: Path, lora: bool) -> None:
    base = make_encoder(storage, tmp_path, normalize=True)
    rate = 0.01 if lora else 0.003
    spec = make_spec(
        storage, base, lora=lora, n_epochs=20, learning_rate=rate, validation_key="files/pairs", eval_interval=1
    )
    channel = Recorder()
    assert run(spec, storage, "runs/one", channel, tmp_path).status == "finished"
    first, last = channel.of(EvalMetrics)[0], channel.of(EvalMetrics)[-1]
    assert last.valid_loss < 0.1 * first.valid_loss
    assert first.valid_mean_token_accuracy < last.valid_mean_token_accuracy == 1.0
    assert channel.of(StepMetrics)[0].num_trained_tokens > 0
    artifact = storage.local_folder("runs/one/artifact")
    assert {"modules.json", "1_Pooling"} <= {path.name for path in artifact.iterdir()}
    texts = ["my bill", "the refund was slow", "app"]
    served = asyncio.run(serve(storage, base, artifact, texts, lora))
    model: Any = AutoModel.from_pretrained(storage.local_folder(base.key) if lora else artifact)
    if lora:
        assert json.loads((artifact / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
        model = PeftModel.from_pretrained(model, str(artifact))
    with torch.no_grad():
        plain = torch.stack([plain_embedding(model.eval(), text) for text in texts])
    np.testing.assert_allclose(served, plain / plain.norm(dim=1, keepdim=True), atol=1e-4)


async def serve(storage: Storage, base: BaseRef, artifact: Path, texts: list[str], lora: bool) -> np.ndarray:
    folder = storage.local_folder(base.key) if lora else artifact
    engine = EncoderEngine(folder, task="embed", adapter=artifact if lora else None, num_threads=1)
    await engine.start()
    try:
        return await engine.encode([ids_of(text) for text in texts])
    finally:
        await engine.stop()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"anchor": "a"}, "positive: missing"),
        ({"positive": "a"}, "anchor: missing"),
        ({"anchor": "a", "positive": " "}, "positive: empty"),
        ({"anchor": "", "positive": "a"}, "anchor: empty"),
        ({"anchor": "a", "positive": "a"}, "positive: the same as anchor"),
        ({"anchor": "a", "positive": "b", "negative": "b"}, "negative: the same"),
        ({"anchor": "a", "positive": "b", "negative": ""}, "negative: empty"),
        ({"anchor": "a", "positive": 7}, "positive: 7 is not text"),
        ({"anchor": "a", "positive": "b", "score": 1}, "score"),
        (
            {"anchor": "a", "positive": "b", "negative": "c"},
            "a triplet record in a file that starts with pair (line 1)",
        ),
    ],
)
def test_a_bad_pair_is_told_by_its_line(row: dict[str, Any], message: str) -> None:
    lines = [json.dumps({"anchor": "x", "positive": "y"}), json.dumps(row)]
    (_, first), (number, second) = iter_records(io.BytesIO("\n".join(lines).encode()))
    assert isinstance(first, PairRecord)
    assert isinstance(second, RecordError)
    assert number == 2
    assert message in second.message


def test_texts_that_only_the_tokenizer_takes_for_the_same_are_refused(storage: Storage, tmp_path: Path) -> None:
    base = make_encoder(storage, tmp_path)
    storage.write_bytes("files/rows", b'{"anchor": "App", "positive": "app"}')
    with pytest.raises(ExamplesError, match="line 1: two of its texts are the same"):
        load_examples(make_spec(storage, base, training_key="files/rows"), storage, tmp_path / "examples")


def test_a_plan_fills_in_what_is_on_auto(storage: Storage, tmp_path: Path) -> None:
    base = make_encoder(storage, tmp_path)
    key = write_pairs(storage, "files/many", num_rows=200)
    made = plan(TrainSpec(base=base, method="embedding", embedding=EmbeddingSpec(), training_key=key), storage)
    assert made.spec.embedding == EmbeddingSpec(temperature=0.05)
    assert (made.spec.hyperparameters.batch_size, made.spec.hyperparameters.max_length) == (64, CONTEXT)
    assert made.spec.unresolved() == []
    assert made.warnings == []


def test_more_workers_than_the_rows_can_feed_are_not_refused_for_a_batch_size_on_auto(
    storage: Storage, tmp_path: Path
) -> None:
    key, base = write_pairs(storage, "files/few", num_rows=10), make_encoder(storage, tmp_path)
    spec = TrainSpec(base=base, method="embedding", embedding=EmbeddingSpec(), training_key=key, num_workers=8)
    assert plan(spec, storage).spec.hyperparameters.batch_size == 16


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"gradient_accumulation_steps": 6}, "method.embedding.hyperparameters.batch_size"),
        ({"max_length": CONTEXT + 1}, "method.embedding.hyperparameters.max_length"),
    ],
)
def test_a_job_that_could_not_learn_is_refused_in_planning(
    storage: Storage, tmp_path: Path, changes: dict[str, Any], param: str
) -> None:
    with pytest.raises(PlanError) as caught:
        plan(make_spec(storage, make_encoder(storage, tmp_path), **changes), storage)
    assert caught.value.param == param


def test_a_language_model_is_no_base_for_it(storage: Storage) -> None:
    spec = make_spec(storage, make_base(storage, LLAMA))
    with pytest.raises(PlanError, match="cannot learn by the method embedding") as caught:
        plan(spec, storage)
    assert (caught.value.code, caught.value.param) == ("invalid_base_model", "model")


def test_the_limit_of_the_layout_binds_training_too(storage: Storage, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "short", pooling="mean_tokens")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    found = import_base(storage, id="short", source=str(folder), revision=None, progress=lambda _: None)
    base = BaseRef(id="short", key=found.storage_key, content_hash=found.content_hash)
    spec = TrainSpec(
        base=base, method="embedding", embedding=EmbeddingSpec(), training_key=write_pairs(storage, "files/p")
    )
    with pytest.raises(PlanError, match="at most 7 are allowed"):
        plan(spec, storage)


def test_a_base_without_a_layer_is_refused_and_one_without_a_pooler_is_not(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    first, second = (load_embedder(folder, 3, torch.float32, CPU).state_dict() for _ in range(2))
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    lost = kept.pop("encoder.layer.1.output.dense.weight")
    assert lost.numel()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failure, match=r"no weights for encoder\.layer\.1\.output\.dense\.weight"):
        load_embedder(folder, 3, torch.float32, CPU)


def test_a_pooling_that_cannot_be_run_is_refused_at_import(storage: Storage, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "encoder", pooling="mean_tokens")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "weightedmean"}')
    with pytest.raises(BaseError, match=r"weightedmean.*without modules\.json"):
        import_base(storage, id="odd", source=str(folder), revision=None, progress=lambda _: None)
