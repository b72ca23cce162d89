"""Planning beside what was planned: memory and time of small real runs, each a process of its own with one thread.

Time is judged by the CPU seconds of the whole process, so that other work on the machine does not count. The last lines
before the figures are the constants of `training.estimate` that would fit these cases best, by least squares of the
relative errors: write them there when the errors have grown.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.bench.material import make_material
from tests.bench.processes import train
from tests.training.labelled import BERT, WORDS, make_encoder
from training import estimate
from training.examples import load_examples
from training.model_shape import ModelShape
from training.plan import Plan, plan
from training.probe import tokens_per_s
from training.spec import ClassificationSpec, EmbeddingSpec, Hyperparameters, LoraSpec, TrainSpec
from training.storage import Storage

GOALS = {"plan_memory_error": "<= 0.15", "plan_time_error": "<= 0.3"}


@dataclass(frozen=True)
class Case:
    """One run."""

    size: str
    lora: bool
    precision: str
    batch_size: int
    num_steps: int
    accumulation: int = 1
    max_length: int = 512
    method: str = "supervised"

    @property
    def name(self) -> str:
        how = "lora" if self.lora else "full"
        name = f"{self.size}_{how}_{self.precision}_{self.batch_size}_{self.accumulation}_{self.max_length}"
        return name if self.method == "supervised" else f"{name}_{self.method}"


CASES = (
    Case("8m", lora=False, precision="fp32", batch_size=2, num_steps=40),
    Case("8m", lora=False, precision="fp32", batch_size=24, num_steps=4),
    Case("8m", lora=False, precision="bf16", batch_size=24, num_steps=6, accumulation=3),
    Case("8m", lora=True, precision="fp32", batch_size=24, num_steps=4),
    Case("8m", lora=True, precision="bf16", batch_size=32, num_steps=6, max_length=128),
    Case("110m", lora=True, precision="bf16", batch_size=4, num_steps=6),
    Case("110m", lora=True, precision="fp32", batch_size=2, num_steps=5),
    Case("110m", lora=False, precision="bf16", batch_size=4, num_steps=5, accumulation=2),
    Case("8m", lora=True, precision="fp32", batch_size=32, num_steps=4, method="classification"),
    Case("encoder", lora=False, precision="fp32", batch_size=64, num_steps=5, max_length=64, method="classification"),
    Case("encoder", lora=False, precision="fp32", batch_size=32, num_steps=5, max_length=64, method="embedding"),
)
ENCODER = {  # of the size of MiniLM, with BERT's usual dropout
    **BERT,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}
NUM_WORDS = 60  # of the encoder's longest texts, which are a token each


def run() -> dict[str, float]:
    """All cases, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        return _Bench(Storage(folder), Path(folder)).run()


class _Bench:
    """One storage with the bases and rows of all cases."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self.storage, self.folder = storage, folder
        self.bases, self.rows = make_material(storage)
        self.bases["encoder"] = make_encoder(storage, ENCODER)
        self.fit: list[tuple[float, ...]] = []

    def run(self) -> dict[str, float]:
        """The largest errors over the cases."""
        memory, seconds = [], []
        for case in CASES:
            spec = self._spec(case)
            planned, duration_s = self._planned(spec)
            _, took = train(planned.spec, self.folder, case.name, num_threads=1)
            peak_bytes, cpu_s = took.rss_bytes, took.cpu_s
            memory.append(planned.peak_memory_bytes / peak_bytes)
            seconds.append(duration_s / cpu_s)
            self._remember(planned.spec, peak_bytes)
            print(
                f"{case.name}: {planned.peak_memory_bytes / 1e6:.0f} MB planned, {peak_bytes / 1e6:.0f} MB taken "
                f"({memory[-1]:.2f}); {duration_s:.1f} s planned, {cpu_s:.1f} s taken ({seconds[-1]:.2f})",
                file=sys.stderr,
                flush=True,
            )
        self._print_fit()
        return {
            "plan_memory_error": max(abs(ratio - 1) for ratio in memory),
            "plan_time_error": max(abs(ratio - 1) for ratio in seconds),
        }

    def _spec(self, case: Case) -> TrainSpec:
        """Rows of at most the length, each read once."""
        key, num_rows = f"files/{case.name}", case.batch_size * case.num_steps
        self.storage.write_bytes(key, "\n".join(self._lines(case)[:num_rows]).encode())
        hyper = Hyperparameters(
            n_epochs=1,
            batch_size=case.batch_size,
            learning_rate=1e-4,
            learning_rate_multiplier=1.0,
            gradient_accumulation_steps=case.accumulation,
        )
        return TrainSpec(
            base=self.bases[case.size],
            training_key=key,
            method=case.method,  # type: ignore[arg-type]
            classification=ClassificationSpec() if case.method == "classification" else None,
            embedding=EmbeddingSpec() if case.method == "embedding" else None,
            adapter=LoraSpec(rank=16, alpha=32.0) if case.lora else None,
            hyperparameters=hyper,
            precision=case.precision,  # type: ignore[arg-type]
            eval_interval=1000,
            checkpoint_interval=1000,
        )

    def _lines(self, case: Case) -> list[str]:
        """Chats, their questions with labels, or for the encoder random words, alone or in pairs."""
        fitting = [line for line in self.rows.lines if len(line) < 3 * case.max_length]
        if case.method == "supervised":
            return fitting
        texts = [json.loads(line)["messages"][0]["content"].strip() for line in fitting]
        if case.size == "encoder":
            draw = random.Random(0)
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(NUM_WORDS // 3, NUM_WORDS))) for _ in range(1000)]
        if case.method == "embedding":
            return [
                json.dumps({"anchor": one, "positive": two}) for one, two in zip(texts[::2], texts[1::2], strict=False)
            ]
        return [json.dumps({"text": text, "label": str(i % 3)}) for i, text in enumerate(texts)]

    def _planned(self, spec: TrainSpec) -> tuple[Plan, float]:
        started = time.process_time()
        planned = plan(spec, self.storage)
        render_s = time.process_time() - started
        mean_tokens = planned.num_tokens / planned.num_examples
        rate = tokens_per_s(planned.spec, self.storage, mean_tokens, num_threads=1, patience_s=600)
        shape = ModelShape(self.storage.local_folder(spec.base.key))
        return planned, estimate.duration_s(planned, shape, rate, render_s)

    def _remember(self, spec: TrainSpec, peak_bytes: int) -> None:
        """What the constants multiply: 1, activations under logits, of LoRA and of full weights, and under other heads,
        logits, bf16; then the rest."""
        examples, _ = load_examples(spec, self.storage, self.folder / f"examples-{len(self.fit)}")
        shape = ModelShape(self.storage.local_folder(spec.base.key))
        tokens = np.array([len(ids) for ids in examples["input_ids"]])
        trained = np.array([sum(mask) for mask in examples["trained"]])
        parts = estimate.parts(spec, shape, tokens, trained)
        kinds = (spec.method == "supervised" and bool(spec.adapter), spec.method == "supervised" and not spec.adapter)
        activations = [parts.activations * kind for kind in (*kinds, spec.method != "supervised")]
        self.fit.append((1, *activations, parts.logits, int(parts.kernels > 0), parts.state, peak_bytes))

    def _print_fit(self) -> None:
        table = np.array(self.fit, dtype=float)
        factors, state, peak = table[:, :-2], table[:, -2], table[:, -1]
        found, *_ = np.linalg.lstsq(factors / peak[:, None], (peak - state) / peak, rcond=None)
        process, lora, full, heads, logits, kernels = found
        print(
            f"best fit: PROCESS_BYTES = {process / 1e6:.0f}_000_000, HELD = {{True: {lora:.2f}, False: {full:.2f}}}, "
            f"HELD_UNDER_HEADS = {heads:.2f}, HELD_LOGITS = {logits:.2f}, KERNEL_BYTES = {kernels / 1e6:.0f}_000_000",
            file=sys.stderr,
        )
