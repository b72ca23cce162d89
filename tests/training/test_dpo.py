"""Preference losses against a plain reimplementation, their accuracy and reference, and what planning says of rows."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.shared import DATA
from tests.training.runs import (
    BASE_KEY,
    GPT_NEO,
    LLAMA,
    Recorder,
    make_base,
    make_dpo_spec,
    make_spec,
    write_preferences,
    write_rows,
)
from training.batches import Examples, collate
from training.evaluation import evaluate
from training.examples import ExamplesError, load_examples
from training.loop import run
from training.lora import LoraLinear, inject
from training.methods import dpo
from training.model import load_model
from training.parallel import Workers
from training.plan import PlanError, plan
from training.progress import EvalMetrics, StepMetrics
from training.spec import DpoSpec, TrainSpec
from training.storage import Storage

LOSS_TYPES = ["sigmoid", "ipo", "simpo", "orpo"]
ALONE = Workers(0, 1, torch.device("cpu"))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def disturb(model: PreTrainedModel) -> None:
    """Move the trained weights away from where they started, as some steps would."""
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        if param.requires_grad:
            param.data += 0.05 * torch.randn(param.shape, generator=generator)


def prepared(spec: TrainSpec, storage: Storage, tmp_path: Path) -> tuple[PreTrainedModel, Examples]:
    """The model after some steps, and examples prepared before them, as the loop does it."""
    model = load_model(storage.local_folder(BASE_KEY), torch.float32, torch.device("cpu"))
    if spec.adapter is not None:
        inject(model, spec.adapter, spec.seed)
    train, _ = load_examples(spec, storage, tmp_path / "examples")
    examples = dpo.prepare(spec, model, train, ALONE, 4)
    disturb(model)
    return model, examples


def plain_log_prob(model: PreTrainedModel, ids: list[int], trained: list[bool]) -> tuple[torch.Tensor, int]:
    """One sequence, not packed."""
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    picked = [log_probs[i - 1, ids[i]] for i in range(1, len(ids)) if trained[i]]
    return torch.stack(picked).sum(), len(picked)


def plain_loss(policy: PreTrainedModel, start: PreTrainedModel, row: dict[str, Any], settings: DpoSpec) -> torch.Tensor:
    """The papers' formulas, written once more."""
    beta, gamma, cut = settings.beta, settings.gamma, row["lengths"][0]
    assert isinstance(beta, float)
    assert isinstance(gamma, float)
    sides = [(row["input_ids"][part], row["trained"][part]) for part in (slice(0, cut), slice(cut, None))]
    (better, n_better), (worse, n_worse) = (plain_log_prob(policy, *side) for side in sides)
    with torch.no_grad():
        (ref_better, _), (ref_worse, _) = (plain_log_prob(start, *side) for side in sides)
    ratio = (better - ref_better) - (worse - ref_worse)
    if settings.loss_type == "sigmoid":
        return -torch.log(torch.sigmoid(beta * ratio))
    if settings.loss_type == "ipo":
        return (ratio - 0.5 / beta) ** 2
    if settings.loss_type == "simpo":
        return -torch.log(torch.sigmoid(beta / n_better * better - beta / n_worse * worse - gamma))
    odds = [torch.exp(p) / (1 - torch.exp(p)) for p in (better / n_better, worse / n_worse)]
    return -better / n_better - beta * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))


@torch.no_grad()
def plain_rewards(
    policy: PreTrainedModel, start: PreTrainedModel, row: dict[str, Any], settings: DpoSpec
) -> list[float]:
    """Of the better and the worse answer: beta * log(p / p_ref), or without a reference beta * log p per token."""
    assert isinstance(settings.beta, float)
    rewards, cut = [], row["lengths"][0]
    for part in (slice(0, cut), slice(cut, None)):
        side = (row["input_ids"][part], row["trained"][part])
        log_prob, num_tokens = plain_log_prob(policy, *side)
        has_reference = settings.loss_type in ("sigmoid", "ipo")
        score = log_prob - plain_log_prob(start, *side)[0] if has_reference else log_prob / num_tokens
        rewards.append(settings.beta * score.item())
    return rewards


def plain_copy(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A second model of transformers' own code, with the adapter of `model` merged into its weights."""
    copy: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    own = dict(copy.named_parameters())
    for name, param in model.named_parameters():
        if name in own:
            own[name].data.copy_(param.data)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            merged = module.base.weight + module.scale * module.lora_B @ module.lora_A
            own[f"{name}.weight"].data.copy_(merged.data)
    return copy


def check_gradients(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Those of the weights, or by the chain rule through W + scale * B A those of the adapter."""
    expected = {name: param.grad for name, param in plain.named_parameters()}
    pairs: list[tuple[Any, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            weight = expected[f"{name}.weight"]
            assert weight is not None
            pairs.append((module.lora_A.grad, module.scale * module.lora_B.T @ weight))
            pairs.append((module.lora_B.grad, module.scale * weight @ module.lora_A.T))
    if not pairs:
        pairs = [(param.grad, expected[name]) for name, param in model.named_parameters()]
    assert pairs
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.detach().abs().max().item())


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients_are_those_of_two_plain_models(
    storage: Storage, tmp_path: Path, loss_type: str, lora: bool
) -> None:
    spec = make_dpo_spec(storage, make_base(storage), lora, loss_type)
    assert spec.dpo is not None
    model, examples = prepared(spec, storage, tmp_path)
    start = AutoModelForCausalLM.from_pretrained(storage.local_folder(BASE_KEY), attn_implementation="eager").eval()
    policy = plain_copy(model, storage.local_folder(BASE_KEY))
    rows = examples[list(range(12))]
    found = dpo.loss_sums(spec, model, collate(rows))
    found.loss.backward()
    plain_rows = [{name: column[i] for name, column in rows.items()} for i in range(12)]
    expected = torch.stack([plain_loss(policy, start, row, spec.dpo) for row in plain_rows]).sum()
    expected.backward()
    assert found.num_counted == 12
    assert found.others is not None
    rewards = torch.tensor([plain_rewards(policy, start, row, spec.dpo) for row in plain_rows]).sum(dim=0)
    torch.testing.assert_close(found.others, torch.stack([*rewards, rewards[0] - rewards[1]]), rtol=1e-4, atol=1e-4)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    check_gradients(model, policy)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_two_micro_batches_are_one_and_neither_leaks(storage: Storage, tmp_path: Path, lora: bool) -> None:
    spec = make_dpo_spec(storage, make_base(storage), lora)
    model, examples = prepared(spec, storage, tmp_path)
    found = []
    for parts in ([[*range(12)]], [[0, 3, 7], [1, 2, 4, 5, 6, 8, 9, 10, 11]], [[i] for i in range(12)]):
        model.zero_grad()
        sums = [dpo.loss_sums(spec, model, collate(examples[part])) for part in parts]
        total = torch.stack([one.loss for one in sums]).sum()
        total.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((total.detach(), sum(int(one.num_correct) for one in sums), gradients))
    for total, correct, gradients in found[1:]:
        assert total.item() == pytest.approx(found[0][0].item(), rel=1e-5)
        assert correct == found[0][1]
        torch.testing.assert_close(gradients, found[0][2], rtol=1e-4, atol=1e-5)


def test_accumulation_changes_no_step(storage: Storage, tmp_path: Path) -> None:
    base, runs = make_base(storage), []
    for parts in (1, 2):
        channel = Recorder()
        spec = make_dpo_spec(storage, base, gradient_accumulation_steps=parts)
        run(spec, storage, f"runs/{parts}", channel, tmp_path)
        runs.append([item.train_loss for item in channel.of(StepMetrics)])
    assert len(runs[0]) == 12
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_before_the_first_step_nothing_is_preferred(storage: Storage, tmp_path: Path, lora: bool) -> None:
    channel = Recorder()
    run(make_dpo_spec(storage, make_base(storage), lora), storage, "runs/one", channel, tmp_path)
    assert channel.of(StepMetrics)[0].train_loss == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize(
    ("loss_type", "model", "lora"),
    [(name, LLAMA, True) for name in LOSS_TYPES]
    + [("sigmoid", LLAMA, False), ("sigmoid", GPT_NEO, True), ("sigmoid", GPT_NEO, False)],
    ids=[*LOSS_TYPES, "full", "padded-lora", "padded-full"],
)
def test_it_learns_to_prefer(
    storage: Storage, tmp_path: Path, loss_type: str, model: dict[str, Any], lora: bool
) -> None:
    valid = write_preferences(storage, "files/valid", 6, first=50)
    spec = make_dpo_spec(storage, make_base(storage, model), lora, loss_type, validation_key=valid, n_epochs=6)
    channel = Recorder()
    assert run(spec, storage, "runs/one", channel, tmp_path).status == "finished"
    steps, last = channel.of(StepMetrics), channel.of(EvalMetrics)[-1]
    assert steps[-1].train_loss < steps[0].train_loss * 0.7
    assert steps[-1].train_mean_token_accuracy == 1.0, "of pairs"
    assert last.valid_mean_token_accuracy == 1.0, "the margin holds on pairs that were not seen"
    for means in (steps[-1].means, last.means):
        assert means["reward_margin"] == pytest.approx(means["reward_chosen"] - means["reward_rejected"], rel=1e-4)
    assert last.means["reward_margin"] > max(0, steps[0].means["reward_margin"])


def test_workers_add_up_to_one(storage: Storage, tmp_path: Path) -> None:
    spec = make_dpo_spec(storage, make_base(storage), validation_key=write_preferences(storage, "files/valid", 7))
    model, examples = prepared(spec, storage, tmp_path)
    loss_sums = partial(dpo.loss_sums, spec)
    whole = evaluate(model, loss_sums, examples, ALONE, 5, dpo.MEANS)
    shares = [dpo.loss_sums(spec, model.eval(), collate(examples[list(range(rank, 12, 5))])) for rank in range(5)]
    assert sum(share.num_counted for share in shares) == 12
    assert sum(share.loss.item() for share in shares) / 12 == pytest.approx(whole.loss, rel=1e-5)
    rewards = torch.stack([share.others for share in shares if share.others is not None]).sum(dim=0) / 12
    assert list(whole.means.values()) == pytest.approx(rewards.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            "dpo",
            "line 1: a chat record, and the method dpo learns from preference records; chat records need supervised",
        ),
        ("supervised", "line 1: a preference record, and the method supervised learns from chat or completion or text"),
    ],
)
def test_rows_of_another_method_are_refused_with_their_line(storage: Storage, method: str, words: str) -> None:
    base = make_base(storage)
    if method == "dpo":
        spec = make_dpo_spec(storage, base, training_key=write_rows(storage, "files/chat"))
    else:
        spec = make_spec(storage, base, training_key=write_preferences(storage, "files/pairs"))
    with pytest.raises(PlanError, match=words) as caught:
        plan(spec, storage)
    assert (caught.value.code, caught.value.param) == ("invalid_training_file", "training_file")
    with pytest.raises(ExamplesError):
        load_examples(spec, storage)


def test_auto_becomes_numbers_and_both_sides_are_counted(storage: Storage) -> None:
    base, key = make_base(storage), write_preferences(storage, "files/pairs", 20)
    asked = TrainSpec(base=base, method="dpo", dpo=DpoSpec(), training_key=key)
    planned = plan(asked, storage)
    assert planned.spec.unresolved() == []
    assert planned.spec.dpo == DpoSpec(beta=0.1, gamma=0.0)
    assert plan(planned.spec, storage) == planned
    train, _ = load_examples(planned.spec, storage)
    assert planned.num_examples == len(train) == 20
    assert planned.num_tokens == sum(sum(row["lengths"]) for row in train)
    assert planned.num_trained_tokens == sum(sum(row["trained"]) for row in train)
    simpo = plan(asked.model_copy(update={"dpo": DpoSpec(loss_type="simpo")}), storage).spec
    assert simpo.dpo == DpoSpec(loss_type="simpo", beta=2.0, gamma=1.0)
    supervised = plan(TrainSpec(base=base, training_key=write_rows(storage, "files/chat", 20)), storage).spec
    rates = [spec.hyperparameters.learning_rate for spec in (planned.spec, supervised)]
    assert isinstance(rates[1], float)
    assert rates[0] == pytest.approx(rates[1] / 10)


def test_a_long_side_and_outputs_that_render_alike_are_refused(storage: Storage) -> None:
    base = make_base(storage)
    rows = storage.read_bytes(write_preferences(storage, "files/pairs")).decode().splitlines()
    long, alike = json.loads(rows[3]), json.loads(rows[5])
    long["non_preferred_output"][0]["content"] = "x" * 200
    alike["non_preferred_output"] = [{**alike["preferred_output"][0], "name": "bob"}]
    rows[3], rows[5] = json.dumps(long), json.dumps(alike)
    storage.write_bytes("files/bad", "\n".join(rows).encode())
    with pytest.raises(PlanError, match=r"line 4: .*at most 128 are allowed.*line 6: the chat template writes both"):
        plan(make_dpo_spec(storage, base, training_key="files/bad"), storage)


def test_real_preferences_train(storage: Storage, tmp_path: Path) -> None:
    source = DATA / "llamafactory" / "dpo_en_demo.json"
    if not source.exists():
        pytest.skip("the shared data are not here")
    rows, roles = [], {"human": "user", "gpt": "assistant", "system": "system"}

    def turn(item: dict[str, str]) -> dict[str, str]:
        return {"role": roles[item["from"]], "content": item["value"][:40]}  # the tiny base reads 128 bytes

    for item in json.loads(source.read_text()):
        better, worse = turn(item["chosen"]), turn(item["rejected"])
        if len(item["conversations"]) == 1 and better != worse and len(json.dumps([better, worse]).encode()) < 240:
            asked = {"messages": [turn(item["conversations"][0])]}
            rows.append({"input": asked, "preferred_output": [better], "non_preferred_output": [worse]})
    assert len(rows) >= 20
    storage.write_bytes("files/real", "\n".join(map(json.dumps, rows[:24])).encode())
    spec = make_dpo_spec(storage, make_base(storage), training_key="files/real", n_epochs=3, batch_size=8)
    assert plan(spec, storage).num_examples == 24
    channel = Recorder()
    assert run(spec, storage, "runs/one", channel, tmp_path).status == "finished"
    steps = channel.of(StepMetrics)
    assert steps[-1].train_loss < steps[0].train_loss
