"""Planning: every auto becomes a number, every token is counted, and what cannot work is refused with its lines."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.training.labelled import BERT, make_encoder, make_labelled_spec
from tests.training.runs import BASE_KEY, Recorder, make_base, make_spec, write_rows
from training import auto, estimate
from training.bases import import_base
from training.loop import run
from training.model_shape import ModelShape
from training.plan import PlanError, load_examples, plan
from training.spec import BaseRef, ClassificationSpec, EarlyStopping, Hyperparameters, LoraSpec, TrainSpec
from training.storage import Storage

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="real models and data are not here")

CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(str(tmp_path_factory.mktemp("storage")))


@pytest.fixture(scope="module")
def bases(storage: Storage) -> dict[str, BaseRef]:
    found = {}
    for name in ("stories260K", "cardputer-chat"):
        source = str(SHARED / "models" / name)
        base = import_base(storage, id=name, source=source, revision=None, progress=lambda line: None)
        found[name] = BaseRef(id=name, key=base.storage_key, content_hash=base.content_hash)
    return found


class Maker:
    """Writes training files and makes specs on them."""

    def __init__(self, storage: Storage, bases: dict[str, BaseRef]) -> None:
        self.storage, self.bases, self.count = storage, bases, 0

    def file(self, rows: list[Any] | bytes) -> str:
        self.count += 1
        data = rows if isinstance(rows, bytes) else b"\n".join(json.dumps(row).encode() for row in rows)
        self.storage.write_bytes(f"files/{self.count}", data)
        return f"files/{self.count}"

    def spec(self, rows: list[Any] | bytes, base: str = "stories260K", **fields: Any) -> TrainSpec:
        hyper = Hyperparameters(**fields.pop("hyper", {}))
        return TrainSpec(base=self.bases[base], training_key=self.file(rows), hyperparameters=hyper, **fields)


@pytest.fixture
def make(storage: Storage, bases: dict[str, BaseRef]) -> Maker:
    return Maker(storage, bases)


def texts(count: int) -> list[Any]:
    return [{"text": f"Once upon a time there was a cat named {'Tom' * (1 + i % 3)}."} for i in range(count)]


def chats(count: int) -> list[Any]:
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]
    return [{"messages": turns} for _ in range(count)]


def test_auto_becomes_numbers_and_a_resolved_spec_plans_to_itself(make: Maker) -> None:
    spec = make.spec(texts(40))
    first = plan(spec, make.storage)
    assert first.spec.unresolved() == []
    hyper = first.spec.hyperparameters
    assert (hyper.n_epochs, hyper.batch_size, hyper.max_length, hyper.learning_rate_multiplier) == (3, 4, 512, 1.0)
    assert first.total_steps == 30
    assert (first.spec.eval_interval, first.spec.checkpoint_interval, first.spec.precision) == (2, 6, "fp32")
    assert first.spec.adapter == LoraSpec(rank=16, alpha=32.0)
    assert plan(first.spec, make.storage) == first


def test_tokens_are_counted_as_the_loop_will_see_them(make: Maker) -> None:
    spec = make.spec(texts(12), validation_key=make.file(texts(3)))
    planned = plan(spec, make.storage)
    train, valid = load_examples(planned.spec, make.storage)
    assert valid is not None
    assert (planned.num_examples, planned.num_validation_examples) == (len(train), len(valid)) == (12, 3)
    assert planned.num_tokens == sum(len(row["input_ids"]) for row in train)
    assert planned.num_trained_tokens == sum(sum(row["trained"]) for row in train) == planned.num_tokens - 12
    assert planned.max_example_tokens == max(len(row["input_ids"]) for row in train)
    assert planned.peak_memory_bytes > 260_032 * 4


def test_the_split_depends_on_the_seed_alone_and_loses_nothing(make: Maker) -> None:
    spec = make.spec([{"text": f"story {i}"} for i in range(20)], validation_split=0.2, seed=7)
    once, again = load_examples(spec, make.storage), load_examples(spec, make.storage)
    assert [part["input_ids"][:] for part in once if part] == [part["input_ids"][:] for part in again if part]
    train, valid = once
    assert valid is not None
    assert (len(train), len(valid)) == (16, 4)
    assert len({tuple(ids) for part in once if part for ids in part["input_ids"]}) == 20
    other = load_examples(spec.model_copy(update={"seed": 8}), make.storage)[1]
    assert other is not None
    assert other["input_ids"][:] != valid["input_ids"][:]
    planned = plan(spec, make.storage)
    assert (planned.num_examples, planned.num_validation_examples) == (16, 4)


def test_a_real_chat_model_plans_chat_rows(make: Maker) -> None:
    planned = plan(make.spec(chats(10), "cardputer-chat"), make.storage)
    assert planned.warnings == []
    assert 0 < planned.num_trained_tokens < planned.num_tokens
    assert planned.total_steps == 30  # 10 epochs of 3 steps: small data is seen 100 times in all


def refused(make: Maker, spec: TrainSpec) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan(spec, make.storage)
    return caught.value


def test_real_rows_with_a_system_message_are_refused_with_lines_where_the_template_drops_it(make: Maker) -> None:
    data = (SHARED / "data/openai-cookbook/toy_chat_fine_tuning.jsonl").read_bytes()
    error = refused(make, make.spec(data, "cardputer-chat"))
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert "line 1: the chat template drops the content of system messages" in error.message
    error = refused(make, make.spec(chats(10), "cardputer-chat", validation_key=make.file(data)))
    assert (error.code, error.param) == ("invalid_validation_file", "validation_file")


def test_only_the_first_50_faults_are_told(make: Maker) -> None:
    error = refused(make, make.spec(b'{"text": 1}\n' * 80))
    assert "line 50:" in error.message
    assert "line 51:" not in error.message


def test_faults_and_good_lines_keep_their_numbers(make: Maker) -> None:
    lines = [json.dumps(row).encode() for row in texts(600)]
    lines[3], lines[400] = b"not json", b""
    lines[500] = b'{"text": 5}'
    error = refused(make, make.spec(b"\n".join(lines)))
    assert "line 4: " in error.message
    assert "line 501: " in error.message
    assert re.findall(r"line (\d+):", error.message) == ["4", "501"]


def test_too_long_examples_are_refused_not_cut(make: Maker) -> None:
    rows = [{"prompt": f"{i} is", "completion": " a number"} for i in range(12)]
    error = refused(make, make.spec(rows, hyper={"max_length": 5}))
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert "at most 5 are allowed" in error.message


def test_plain_text_is_cut_and_every_token_but_the_first_of_a_piece_is_learned_from(make: Maker) -> None:
    rows = texts(12)
    whole, _ = load_examples(make.spec(rows), make.storage)
    spec = make.spec(rows, hyper={"max_length": 5})
    cut, _ = load_examples(spec, make.storage)
    assert max(map(len, cut["input_ids"])) == 5
    assert list(chain(*cut["input_ids"])) == list(chain(*whole["input_ids"]))
    assert all(not trained[0] and all(trained[1:]) for trained in cut["trained"])
    made = plan(spec, make.storage)
    assert (made.num_examples, made.num_tokens) == (len(cut), sum(map(len, cut["input_ids"])))
    cuts = "Texts longer than the 5 tokens that are allowed were cut"
    assert made.warnings[-1] == f"{cuts}: 12 rows into {len(cut)} pieces."


def test_a_warning_counts_the_cut_rows_of_both_files_and_the_last_token_of_a_text_is_kept(make: Maker) -> None:
    """Of a text that is one token too long, that token would be a piece of its own, which nothing predicts."""
    short, long = {"text": "Tom"}, {"text": "Tom and Tom and Tom"}
    (num_tokens,) = {len(ids) for ids in load_examples(make.spec([long]), make.storage)[0]["input_ids"]}
    rows = [short] * 11 + [long]
    spec = make.spec(rows, hyper={"max_length": num_tokens - 1}, validation_key=make.file([long, short]))
    made = plan(spec, make.storage)
    assert made.warnings[-1].endswith("were cut: 2 rows into 4 pieces.")
    cut, valid = load_examples(made.spec, make.storage)
    assert [len(ids) for ids in cut["input_ids"]][-2:] == [num_tokens - 2, 2]
    assert valid is not None
    assert (made.num_examples, made.num_validation_examples) == (len(cut), len(valid)) == (13, 3)
    assert made.num_trained_tokens == sum(map(sum, cut["trained"])) == made.num_tokens - 13


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"hyper": {"max_length": 513}}, "method.supervised.hyperparameters.max_length"),
        ({"hyper": {"batch_size": 2}, "num_workers": 3}, "method.supervised.hyperparameters.batch_size"),
        (
            {"hyper": {"learning_rate": 1e-3, "learning_rate_multiplier": 2.0}},
            "method.supervised.hyperparameters.learning_rate_multiplier",
        ),
        (
            {"hyper": {"batch_size": 4, "gradient_accumulation_steps": 5}},
            "method.supervised.hyperparameters.gradient_accumulation_steps",
        ),
        ({"early_stopping": EarlyStopping(patience=1)}, "early_stopping"),
        ({"adapter": LoraSpec(rank=65)}, "adapter.rank"),
        ({"adapter": LoraSpec(targets=("q_proj", "c_attn"))}, "adapter.targets"),
        ({"adapter": LoraSpec(targets=("proj",))}, "adapter.targets"),
    ],
)
def test_impossible_settings_are_refused_by_field(make: Maker, fields: dict[str, Any], param: str) -> None:
    error = refused(make, make.spec(texts(12), **fields))
    assert (error.code, error.param) == ("invalid_value", param)


def test_a_classifier_is_asked_for_no_samples(make: Maker) -> None:
    rows = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(12)]
    settings = {"method": "classification", "classification": ClassificationSpec(), "sample_prompts": ("Who?",)}
    error = refused(make, make.spec(rows, **settings))
    assert (error.code, error.param) == ("invalid_value", "sample_prompts")


def test_unknown_targets_are_told_the_known_ones(make: Maker) -> None:
    error = refused(make, make.spec(texts(12), adapter=LoraSpec(targets=("c_attn",))))
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in error.message
    assert plan(make.spec(texts(12), adapter=LoraSpec(targets=("q_proj", "0.mlp.up_proj"))), make.storage)


def test_chat_rows_need_a_chat_template(make: Maker) -> None:
    error = refused(make, make.spec(chats(12)))
    assert error.param == "training_file"
    assert "no chat template" in error.message


@pytest.mark.parametrize("count", [0, 9])
def test_fewer_than_ten_examples_are_refused(make: Maker, count: int) -> None:
    error = refused(make, make.spec(texts(count)))
    assert f"has {count} examples" in error.message


def test_the_multiplier_scales_the_automatic_rate_and_an_absolute_rate_wins(make: Maker) -> None:
    rows = texts(12)
    rate = plan(make.spec(rows), make.storage).spec.hyperparameters.learning_rate
    halved = plan(make.spec(rows, hyper={"learning_rate_multiplier": 0.5}), make.storage).spec.hyperparameters
    assert (rate, halved.learning_rate, halved.learning_rate_multiplier) == (2e-3, 1e-3, 0.5)
    absolute = plan(make.spec(rows, hyper={"learning_rate": 3e-4}), make.storage).spec.hyperparameters
    assert (absolute.learning_rate, absolute.learning_rate_multiplier) == (3e-4, 1.0)


def test_a_template_without_an_end_of_turn_is_warned_of(make: Maker, tmp_path: Path) -> None:
    for path in (SHARED / "models" / "stories260K").glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def warnings(template: str) -> list[str]:
        (tmp_path / "chat_template.jinja").write_text(template)
        base = import_base(make.storage, id="x", source=str(tmp_path), revision=None, progress=lambda line: None)
        make.bases["x"] = BaseRef(id="x", key=base.storage_key, content_hash=base.content_hash)
        return plan(make.spec(chats(12), "x"), make.storage).warnings

    assert warnings(CHATML) == []
    (warning,) = warnings(CHATML.replace("+ eos_token", "+ '\n'"))
    assert "will not learn to stop" in warning
    (warning,) = warnings(CHATML.replace("{{ '<s>assistant\n' }}", "{{ '<s>assistant\nThink' }}"))
    assert "What serving sends" in warning


def test_full_fine_tuning_takes_a_lower_rate_and_more_memory(make: Maker) -> None:
    rows = texts(12)
    lora, full = plan(make.spec(rows), make.storage), plan(make.spec(rows, adapter=None), make.storage)
    assert full.spec.hyperparameters.learning_rate < lora.spec.hyperparameters.learning_rate
    assert full.peak_memory_bytes > lora.peak_memory_bytes


def test_the_rules_of_auto_at_their_edges() -> None:
    assert [auto.n_epochs(n) for n in (1, 4, 10, 33, 34, 1000, 10_000, 100_000)] == [25, 25, 10, 4, 3, 3, 2, 1]
    assert [auto.batch_size(n, 1) for n in (1, 2, 10, 1000, 5000, 100_000)] == [1, 1, 4, 4, 10, 32]
    assert [auto.batch_size(10, workers) for workers in (2, 3, 8)] == [4, 6, 8]
    assert auto.learning_rate(4096, lora=True) == pytest.approx(10 * auto.learning_rate(4096, lora=False))
    assert [auto.learning_rate(1, lora=lora) for lora in (True, False)] == [2e-3, 1e-3]
    assert auto.gradient_accumulation_steps(32, 1, 1000.0, "supervised") == 8
    assert auto.gradient_accumulation_steps(4, 2, 1e9, "supervised") == 2
    assert auto.gradient_accumulation_steps(64, 1, 1e9, "embedding") == 32, "each example needs another"
    sizes = [auto.batch_size(10, workers, "embedding") for workers in (1, 2, 4, 8)]
    assert sizes == [5, 6, 8, 16], "on each worker too"
    assert (auto.precision(10**6), auto.precision(10**9)) == ("fp32", "bf16")
    assert (auto.eval_interval(1), auto.checkpoint_interval(1)) == (1, 1)
    assert [auto.eval_interval(total, 4) for total in (1, 3, 8, 10, 400)] == [1, 1, 2, 3, 100]


def test_sharded_weights_take_less_of_each_worker_than_whole_ones(make: Maker) -> None:
    rows = texts(12)
    fields: dict[str, Any] = {"adapter": None, "num_workers": 4}
    data = plan(make.spec(rows, **fields), make.storage, on_gpu=True)
    fsdp = plan(make.spec(rows, parallel="fsdp", **fields), make.storage, on_gpu=True)
    moments = 8 * 260_032  # and more
    assert fsdp.peak_memory_bytes < data.peak_memory_bytes - moments * 3 // 4
    error = refused(make, make.spec(rows, parallel="fsdp"))
    assert (error.code, error.param) == ("invalid_value", "parallel")


def test_a_range_of_workers_takes_the_memory_of_the_fewest_and_the_batches_of_the_most(make: Maker) -> None:
    rows = texts(12)
    for parallel, like in (("data", 4), ("fsdp", 2)):
        fields: dict[str, Any] = {"adapter": None, "parallel": parallel}
        of_range = plan(make.spec(rows, num_workers=4, min_workers=2, **fields), make.storage, on_gpu=True)
        of_most = plan(make.spec(rows, num_workers=4, **fields), make.storage, on_gpu=True)
        assert of_range.spec.hyperparameters == of_most.spec.hyperparameters
        hyper = of_most.spec.hyperparameters.model_dump() | {"gradient_accumulation_steps": 4 // like}
        same_parts = plan(make.spec(rows, num_workers=like, hyper=hyper, **fields), make.storage, on_gpu=True)
        assert of_range.peak_memory_bytes == same_parts.peak_memory_bytes
    error = refused(make, make.spec(rows, num_workers=4, min_workers=1, parallel="fsdp"))
    assert (error.code, error.param) == ("invalid_value", "parallel")


def test_memory_grows_with_the_largest_micro_batch_not_with_the_data(make: Maker) -> None:
    short, long = texts(40), [*texts(39), {"text": "once upon a time " * 60}]

    def peak(rows: list[Any], **hyper: Any) -> int:
        spec = make.spec(rows, hyper={"n_epochs": 1, "batch_size": 8, "gradient_accumulation_steps": 1, **hyper})
        return plan(spec, make.storage).peak_memory_bytes

    assert peak(short) < peak(long)
    assert peak(short) == pytest.approx(peak(short * 3), rel=0.01)
    assert peak(long, gradient_accumulation_steps=8) < peak(long)


SSM: dict[str, Any] = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
HYBRID: dict[str, Any] = {
    "model_type": "bamba",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attn_layer_indices": [1],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
}


@pytest.mark.parametrize(("model", "hint"), [(SSM, "adapter: train all"), (HYBRID, "q_proj")], ids=["all", "hybrid"])
def test_an_adapter_on_state_space_blocks_is_refused_before_anything_runs(
    tmp_path: Path, model: dict[str, Any], hint: str
) -> None:
    """Their code reads weights past the layers, so an adapter would end the first step without a code."""
    storage = Storage(str(tmp_path))
    base = make_base(storage, model)
    for targets in ("all-linear", ("in_proj",)):
        with pytest.raises(PlanError, match=hint) as caught:
            plan(make_spec(storage, base, adapter=LoraSpec(rank=2, alpha=4.0, targets=targets)), storage)
        assert (caught.value.code, caught.value.param) == ("invalid_value", "adapter.targets")
    plan(make_spec(storage, base, lora=False), storage)
    if model is HYBRID:
        plan(make_spec(storage, base, adapter=LoraSpec(rank=2, alpha=4.0, targets=("q_proj", "v_proj"))), storage)


def test_a_classifier_holds_no_logits_of_its_vocabulary(tmp_path: Path) -> None:
    """However many words a base knows, only their embeddings take memory; and an encoder's MLP has no gate."""
    parts = []
    for number, vocab_size in enumerate((64, 20_000)):
        storage = Storage(str(tmp_path / str(number)))
        spec = make_labelled_spec(storage, make_encoder(storage, {**BERT, "vocab_size": vocab_size}))
        tokens = np.array([9] * 6 + [12] * 6)
        shape = ModelShape(storage.local_folder(spec.base.key))
        assert not shape.has_gates
        parts.append(estimate.parts(spec, shape, tokens, tokens))
    assert [part.logits for part in parts] == [0, 0]
    assert parts[0].activations == parts[1].activations > 0
    assert parts[1].state - parts[0].state == (20_000 - 64) * 32 * (4 + estimate.ADAM_BYTES)


@pytest.mark.parametrize("lora", [None, LoraSpec()], ids=["full", "lora"])
def test_gpt2_is_imported_and_planned_by_what_a_run_stores(tmp_path: Path, lora: LoraSpec | None) -> None:
    """Its class is no …ForCausalLM and its matrices lie transposed."""
    storage = Storage(str(tmp_path / "storage"))
    make_base(storage, {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128})
    source = str(storage.local_folder(BASE_KEY))
    base = import_base(storage, id="gpt2", source=source, revision=None, progress=lambda line: None)
    ref = BaseRef(id="gpt2", key=base.storage_key, content_hash=base.content_hash)
    rows = write_rows(storage, "files/train")
    made = plan(
        TrainSpec(base=ref, training_key=rows, adapter=lora, hyperparameters=Hyperparameters(n_epochs=1)), storage
    )
    assert run(made.spec, storage, "runs/one", Recorder(), tmp_path / "scratch").status == "finished"
    folder = storage.local_folder("runs/one/artifact")
    weights = load_file(folder / ("model.safetensors" if lora is None else "adapter_model.safetensors"))
    assert 4 * sum(tensor.numel() for tensor in weights.values()) == made.artifact_bytes
