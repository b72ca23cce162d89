"""The encoder engine computes what transformers computes, whatever it batches together, and fails cleanly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from service.engine.admission import EngineFailed
from service.engine.encoder import EncoderEngine, UnfitSequence, Waiting, next_batch
from service.engine.protocol import AdapterMismatch, QueueFull
from tests.engine.encoders import (
    CONTEXT,
    LABELS,
    WIDTH,
    bert_config,
    ids_of,
    probabilities,
    save_classifier,
    save_encoder,
)
from training.artifact import BrokenFolder
from training.pooling import PoolingError

TEXTS = [
    "my card was charged twice",
    "the app crashes",
    "thanks, great app! i love it, it is not slow, the refund was great",
    "a",
    "error error error working? not working",
]
IDS = [ids_of(text) for text in TEXTS]


@asynccontextmanager
async def running(folder: Path, task: Any, **options: Any) -> AsyncIterator[EncoderEngine]:
    engine = EncoderEngine(folder, task=task, num_threads=1, **options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"))


async def test_probabilities_are_those_of_transformers(classifier: Path) -> None:
    async with running(classifier, "classify") as engine:
        assert engine.labels == LABELS
        found = np.exp(await engine.encode(IDS))
    expected = [probabilities(classifier, text) for text in TEXTS]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.max() - found.min() > 0.1, "the texts must differ for the test to say anything"


async def test_calibration_divides_the_logits(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, temperature=2.5)
    async with running(folder, "classify") as engine:
        found = await engine.encode(IDS)
    logits = np.log([probabilities(folder, text) for text in TEXTS]) / 2.5
    np.testing.assert_allclose(found, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), atol=1e-5)


async def test_what_is_batched_together_changes_no_answer(classifier: Path) -> None:
    async with running(classifier, "classify") as engine:
        alone = [(await engine.encode([ids]))[0] for ids in IDS]
        at_once = await asyncio.gather(*(engine.encode([ids, IDS[0]]) for ids in IDS))
        assert engine.stats().num_running == engine.stats().num_waiting == 0
    np.testing.assert_allclose([rows[0] for rows in at_once], alone, atol=1e-5)
    np.testing.assert_allclose([rows[1] for rows in at_once], [alone[0]] * len(IDS), atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", [None, "mean_tokens", "cls_token", "max_tokens"])
async def test_embeddings_are_pooled_as_the_folder_says(tmp_path: Path, mode: str | None, normalize: bool) -> None:
    folder = save_encoder(tmp_path, pooling=mode, normalize=normalize)
    async with running(folder, "embed") as engine:
        found = await engine.encode(IDS)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = [model(torch.tensor([ids])).last_hidden_state[0] for ids in IDS]
    plain = {"cls_token": lambda s: s[0], "max_tokens": lambda s: s.amax(dim=0)}.get(
        mode or "", lambda s: s.mean(dim=0)
    )
    expected = torch.stack([plain(s) for s in states])
    if normalize or mode is None:  # a folder that says nothing is normalised
        expected = expected / expected.norm(dim=1, keepdim=True)
    assert found.shape == (len(IDS), WIDTH)
    np.testing.assert_allclose(found, expected, atol=1e-5)


async def test_a_limit_of_the_layout_counts(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, pooling="mean_tokens")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    async with running(folder, "embed") as engine:
        assert engine.max_context == 8
        with pytest.raises(UnfitSequence, match="9 tokens") as caught:
            await engine.encode([(2,) * 8, (2,) * 9])
    assert (caught.value.index, caught.value.is_too_long) == (1, True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", [{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "1_Dense"}], "Dense"),
        (
            "modules.json",
            [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "../1_Pooling"}],
            "entry",
        ),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean, cls"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "lasttoken"),
    ],
)
async def test_a_layout_that_is_not_understood_is_refused(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    folder = save_encoder(tmp_path, pooling="mean_tokens")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(PoolingError, match=message):
        async with running(folder, "embed"):
            pass


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
async def test_a_lora_classifier_is_merged_with_its_label_head(tmp_path: Path, variant: dict[str, bool]) -> None:
    base, adapter = save_encoder(tmp_path / "base"), tmp_path / "adapter"
    tuned = get_peft_model(
        BertForSequenceClassification.from_pretrained(base, config=bert_config()),
        LoraConfig(
            task_type="SEQ_CLS",
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            modules_to_save=["classifier"],
            **variant,
        ),
    )
    disturb(tuned)
    tuned.save_pretrained(adapter)
    bert_config().save_pretrained(adapter)
    with torch.no_grad():
        expected = [tuned.eval()(torch.tensor([ids])).logits[0].softmax(dim=-1).tolist() for ids in IDS]
    async with running(base, "classify", adapter=adapter) as engine:
        np.testing.assert_allclose(np.exp(await engine.encode(IDS)), expected, atol=1e-4)


def disturb(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("change", "message"), [({"use_qalora": True}, "use_qalora"), ({"bias": "all"}, "method than LoRA")]
)
async def test_an_adapter_that_is_not_understood_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    base = save_encoder(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 8, **change}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterMismatch, match=message):
        async with running(base, "embed", adapter=tmp_path / "adapter"):
            pass


async def test_a_head_that_nobody_trained_is_not_served(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path)
    with pytest.raises(BrokenFolder, match=r"no weights for classifier\.bias"):
        async with running(folder, "classify"):
            pass


async def test_a_causal_model_with_a_label_head_answers_on_the_last_token_of_each_text(tmp_path: Path) -> None:
    """Also without a padding token, where transformers itself cannot batch."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, num_labels=3, pad_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(2)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits[0].log_softmax(dim=-1).tolist() for ids in IDS]
    async with running(tmp_path, "classify") as engine:
        np.testing.assert_allclose(await engine.encode(IDS), expected, atol=1e-5)


async def test_positions_that_count_from_the_padding_id_shorten_the_context(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    async with running(tmp_path, "classify") as engine:
        assert engine.max_context == 18
        assert (await engine.encode([(5,) * 18])).shape == (1, 2)


@pytest.mark.parametrize(
    ("ids", "message"), [((), "no tokens"), ((5,) * (CONTEXT + 1), "at most"), ((10**6,), "vocab")]
)
async def test_one_unreadable_sequence_refuses_its_request_alone(classifier: Path, ids: Any, message: str) -> None:
    async with running(classifier, "classify") as engine:
        with pytest.raises(UnfitSequence, match=message) as caught:
            await engine.encode([IDS[0], ids])
        assert caught.value.index == 1
        assert (await engine.encode([IDS[0]])).shape == (1, 3)


async def test_a_full_queue_refuses_and_an_abandoned_request_makes_room(classifier: Path) -> None:
    async with running(classifier, "classify", max_requests=1) as engine:
        first = asyncio.create_task(engine.encode(IDS * 200))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await engine.encode([IDS[0]])
        first.cancel()
        await asyncio.wait({first})
        assert engine.stats().num_waiting == 0
        assert (await engine.encode([IDS[0]])).shape == (1, 3)


async def test_a_stopped_engine_ends_open_requests_and_says_so(classifier: Path) -> None:
    engine = EncoderEngine(classifier, task="classify", num_threads=1)
    with pytest.raises(EngineFailed, match="not been started"):
        await engine.encode(IDS)
    await engine.start()
    asked = asyncio.create_task(engine.encode(IDS * 200))
    await asyncio.sleep(0)
    await engine.stop()
    with pytest.raises(EngineFailed):
        await asked
    assert not engine.healthy


async def test_batches_begin_with_the_oldest_and_hold_its_neighbours_in_length() -> None:
    def waiting(*lengths: int) -> list[Waiting]:
        loop = asyncio.get_running_loop()
        return [Waiting((1,) * length, loop.create_future()) for length in lengths]

    def lengths(items: list[Waiting]) -> list[int]:
        return [len(item.token_ids) for item in items]

    assert lengths(next_batch(waiting(5, 50, 6, 4, 40, 5), max_tokens=24)) == [5, 5, 6, 4]
    assert lengths(next_batch(waiting(50, 5), max_tokens=24)) == [50]
    assert next_batch([], max_tokens=24) == []
