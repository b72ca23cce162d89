"""Training on one GPU: a random Llama of 1B parameters on real chat rows, bf16, without Ray; tokens/s and MFU.

Ours is `python -m training`, as a user starts it without the service. A token counts when a model reads it for
training, with or without a loss, and padding never does. Steps are timed from the end of the warm-up to the end of the
last one. MFU, model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", appendix B), is the FLOPs that these tokens need
(`flops`) over time, divided by the dense bf16 peak, which is that of large matrix products measured just before.

The peer is TRL's SFTTrainer on the same rows, packed to 512 tokens and flattened, with torch's own attention, which
sees the square of a micro-batch: it is run with a few sizes of micro-batch, and its fastest counts. For LoRA its frozen
weights are loaded in bf16, as ours are. Its MFU is by the same formula; what it does beyond that is no use.

Needs about 70 GiB of the GPU's memory, and 40 GB of disk where temporary files are.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bench.material import MAX_LENGTH, Rows, chat_rows, make_base, train_tokenizer
from tests.bench.processes import PEER, tokens_per_s, train, train_peer
from training.batches import Batches
from training.estimate import trained_parameters
from training.examples import load_examples
from training.model_shape import ModelShape
from training.spec import Hyperparameters, LoraSpec, TrainSpec
from training.storage import Storage

GOALS = {"full_1b_mfu": ">= 0.5", "lora_1b_mfu": ">= 0.5"}
VOCAB_SIZE = 32_000
LLAMA_1B: dict[str, Any] = {  # the shape of Llama 3.2 1B with a smaller vocabulary: 1.04 billion parameters
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
RANK, ALPHA = 16, 32.0
ROWS_PER_STEP, NUM_MICRO_BATCHES = 256, 2
NUM_STEPS, NUM_WARMUP_STEPS = 24, 4  # the first steps meet new shapes, for which memory is fetched and kernels chosen
PEER_ROWS = (4, 8, 16)  # of 512 tokens in a micro-batch
PEAK_SIZE = 8192
PEAK_PRODUCTS, PEAK_ROUNDS = 100, 8


def run() -> dict[str, float]:
    """All figures; none where there is no GPU."""
    if not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is false), so there is nothing to measure.")
        return {}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if not PEER.exists():
        print("TRL is not measured: run `make peers` first for the comparison.")
    with tempfile.TemporaryDirectory() as folder:
        return _Bench(Storage(folder), Path(folder)).run()


@dataclass(frozen=True)
class _Measured:
    """One side's figures."""

    tokens_per_s: float
    mfu: float


class _Bench:
    """One storage with the base and the rows that all runs share."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        rows = chat_rows()
        self.storage, self.folder = storage, folder
        self.base = make_base(storage, "1b", LLAMA_1B, train_tokenizer(rows, VOCAB_SIZE), torch.bfloat16)
        self.base_folder = Path(storage.path(self.base.key))
        self.shape = ModelShape(self.base_folder)
        self.rows = Path(storage.path("files/rows"))
        Rows(self.base_folder, rows).write(self.rows, 0, NUM_STEPS * ROWS_PER_STEP)
        self._count_tokens()
        self.peak = bf16_peak()
        print(f"{self.shape.num_parameters / 1e9:.2f}B parameters; {self.peak / 1e12:.0f} TFLOP/s dense bf16")

    def run(self) -> dict[str, float]:
        """Both ways of training, both sides of each directly after one another."""
        figures = {"peak_bf16_tflops": self.peak / 1e12}
        for name, lora in (("full_1b", False), ("lora_1b", True)):
            ours = self._ours(name, lora)
            figures |= {f"{name}_mfu": ours.mfu, f"{name}_tokens_per_s": ours.tokens_per_s}
            if PEER.exists():
                theirs = self._theirs(name, lora)
                figures |= {f"{name}_peer_mfu": theirs.mfu, f"{name}_peer_tokens_per_s": theirs.tokens_per_s}
                figures[f"{name}_vs_trl"] = ours.tokens_per_s / theirs.tokens_per_s
        return figures

    def _count_tokens(self) -> None:
        """Of the examples, and of each step in the order that our loop takes."""
        spec = self._spec(lora=False)
        examples, _ = load_examples(spec, self.storage, self.folder / "counted")
        batches = Batches(examples, batch_size=ROWS_PER_STEP, n_epochs=1, seed=spec.seed)
        self.lengths = [sum(lengths) for lengths in examples["lengths"]]
        self.num_trained = sum(sum(row) for row in examples["trained"])
        steps = range(1, batches.total_steps + 1)
        self.num_step_tokens = [sum(self.lengths[i] for i in batches.indices(step)) for step in steps]

    def _ours(self, name: str, lora: bool) -> _Measured:
        steps, _ = train(self._spec(lora), self.folder, name)
        shutil.rmtree(self.folder / "runs" / name)  # checkpoints of many gigabytes
        at = [step["at"] for step in steps]
        return self._judged(lora, tokens_per_s(at, self.num_step_tokens, NUM_WARMUP_STEPS))

    def _theirs(self, name: str, lora: bool) -> _Measured:
        """Its fastest micro-batch; each step has about the tokens of ours."""
        num_packed = sum(self.lengths) / NUM_STEPS / MAX_LENGTH
        speeds = []
        for num_rows in PEER_ROWS:
            accumulation = max(1, round(num_packed / num_rows))
            settings = self._peer_settings(lora, num_rows * accumulation, accumulation)
            result, _ = train_peer(settings)
            shutil.rmtree(settings["output"])
            speeds.append(tokens_per_s(result["at"], result["num_all_tokens"], NUM_WARMUP_STEPS))
            print(f"TRL, {name}, {num_rows} packed rows at a time: {speeds[-1]:.0f} tokens/s", flush=True)
        return self._judged(lora, max(speeds))

    def _peer_settings(self, lora: bool, batch_size: int, accumulation: int) -> dict[str, Any]:
        return {
            "model": str(self.base_folder),
            "rows": str(self.rows),
            "output": str(self.folder / "theirs"),
            "best": True,
            "lora_rank": RANK if lora else 0,
            "lora_alpha": ALPHA,
            "batch_size": batch_size,
            "accumulation": accumulation,
            "gradient_checkpointing": False,
            "max_length": MAX_LENGTH,
            "learning_rate": 1e-4,
            "max_steps": -1,
            "use_cpu": False,
            "model_options": {"dtype": "bfloat16"} if lora else {},
        }

    def _judged(self, lora: bool, speed: float) -> _Measured:
        """MFU from tokens per second, at what a token of these rows needs on average."""
        num_adapter = trained_parameters(self._spec(lora), self.shape) if lora else 0
        per_token = flops(self.shape, num_adapter, self.lengths, self.num_trained) / sum(self.lengths)
        return _Measured(speed, per_token * speed / self.peak)

    def _spec(self, lora: bool) -> TrainSpec:
        hyper = Hyperparameters(
            n_epochs=1,
            batch_size=ROWS_PER_STEP,
            learning_rate_multiplier=1.0,
            learning_rate=1e-4,
            gradient_accumulation_steps=NUM_MICRO_BATCHES,
            max_length=MAX_LENGTH,
        )
        return TrainSpec(
            base=self.base,
            training_key="files/rows",
            adapter=LoraSpec(rank=RANK, alpha=ALPHA) if lora else None,
            hyperparameters=hyper,
            precision="bf16",
            eval_interval=1000,
            checkpoint_interval=1000,
        )


def flops(shape: ModelShape, num_adapter: int, lengths: Sequence[int], num_trained: int) -> float:
    """FLOPs that forward and backward pass over sequences of these lengths need.

    A number of a matrix costs 2 a token forward, 2 for the gradient of its input, and 2 for its own (Kaplan et al.
    2020, "Scaling Laws for Neural Language Models", section 2.1), which frozen weights do not need: 6 N, or with an
    adapter 4 N + 6 N_adapter. Norms and the embedding's look-up are not counted; the head is, for the `num_trained`
    tokens with a loss alone. Attention adds 12 * layers * width * length a token, in which causality saves nothing
    (Chowdhery et al. 2022, "PaLM", appendix B); here each sequence has its own length.
    """
    per_number = 4 if num_adapter else 6
    num_tokens, num_squares = sum(lengths), sum(length**2 for length in lengths)
    in_layers = sum(rows * columns for rows, columns in shape.linear_weights().values())
    layers = (per_number * in_layers + 6 * num_adapter) * num_tokens
    head = per_number * shape.vocab_size * shape.hidden_size * num_trained
    return layers + head + 12 * shape.num_layers * shape.hidden_size * num_squares


def bf16_peak() -> float:
    """FLOP/s of dense bf16 products of large square matrices: the best of several rounds, a second together."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = [_round_s(a, b, out) for _ in range(PEAK_ROUNDS + 1)][1:]  # the first one warms up
    del a, b, out
    torch.cuda.empty_cache()
    return 2 * PEAK_SIZE**3 * PEAK_PRODUCTS / min(seconds)


def _round_s(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(PEAK_PRODUCTS):
        torch.mm(a, b, out=out)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
