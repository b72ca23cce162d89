"""The rules behind "auto": one small function per hyperparameter, each with its source.

Pure arithmetic on the numbers that planning has counted; knows no files.
"""

from __future__ import annotations

from math import ceil
from typing import Any, Literal

from training.spec import AUTO, TrainSpec

MAX_MICRO_BATCH_TOKENS = 4096
_SMALL_MODEL = 50_000_000  # parameters
_SMALL_CLASSIFIER = 10_000_000


def n_epochs(num_examples: int, method: str = "supervised", num_labels: int = 0) -> int:
    """Three passes; more over small data (until 100 examples are seen), fewer over large (no more than 25,000).

    The rule of OpenAI's cookbook, "Data preparation and analysis for chat model fine-tuning" (TARGET_EPOCHS 3,
    MIN/MAX_TARGET_EXAMPLES 100/25000, MIN/MAX_DEFAULT_EPOCHS 1/25). A classifier starts with a head that knows nothing:
    it sees 12,000 texts, and 640 of each label on average, within 3 and 10 passes. Measured with MiniLM: banking77
    (10,003 texts, 77 labels) has a test accuracy of 0.84 after one pass, 0.92 after three, 0.93 after five; SMS spam
    (4,137 texts, 2 labels) is learned by heart in three, and more find no more spam."""
    if method == "classification":
        return max(3, min(10, ceil(max(12_000, 640 * num_labels) / num_examples)))
    if num_examples * 3 < 100:
        return min(25, ceil(100 / num_examples))
    return max(1, min(3, 25_000 // num_examples))


def batch_size(num_examples: int, num_workers: int, method: str = "supervised") -> int:
    """About 0.2 % of the data, as OpenAI's API chose it, within 4 and 32; each worker gets at least one example.

    Not less than 4, because single examples make noisy steps on small data; not more than 32, because LoRA falls
    behind full fine-tuning as batches grow (Schulman et al. 2025, "LoRA Without Regret"). For a classifier, 3 % of the
    data within 8 and 32, the sizes that Devlin et al. 2019 ("BERT") fine-tune with are 16 and 32: one text is one
    decision, not one for each token. For embeddings 64, because the other examples of a batch are the negatives; each
    worker gets two, since it looks for negatives among its own."""
    if method == "embedding":
        size = 64
    elif method == "classification":
        size = max(8, min(32, round(0.03 * num_examples)))
    else:
        size = max(4, min(32, round(0.002 * num_examples)))
    size = max(1, min(size, num_examples // 2))
    return num_workers * max(_least_per_batch(method), ceil(size / num_workers))


def _least_per_batch(method: str) -> int:
    """Examples without which a worker learns nothing: an embedding's needs another one as a negative."""
    return 2 if method == "embedding" else 1


_RATE_SHARES = {"supervised": 1.0, "dpo": 0.1, "classification": 1.0, "embedding": 0.2}


def learning_rate(hidden_size: int, *, lora: bool, method: str = "supervised") -> float:
    """5e-5 * (2000 / width) ** 0.78, and ten times that for LoRA; within 1e-4 to 2e-3 (LoRA), 1e-5 to 1e-3 (full).

    LoRA's best rate is about ten times that of full fine-tuning, whatever the rank, when alpha is 32; the width's
    exponent is the one fitted for Llama-type models (Schulman et al. 2025, "LoRA Without Regret", and the get_lr of
    its authors' cookbook). DPO takes a tenth, the bold end of what is customary: the alignment handbook goes from 2e-5
    to 5e-7 (full) and from 2e-4 to 5e-6 (LoRA) for Zephyr (Tunstall et al. 2023, "Zephyr: Direct Distillation of LM
    Alignment"); at a supervised rate a preference loss drives the probabilities of both answers down.

    All weights of a classifier take 3e-4 * (384 / width) ** 2, within 1e-5 and 5e-4: between what was measured with
    MiniLM (width 384; see `n_epochs`) and the 5e-5 of Devlin et al. 2019 for BERT-base (width 768)."""
    if method == "classification" and not lora:
        return float(f"{min(5e-4, max(1e-5, 3e-4 * (384 / hidden_size) ** 2)):.3g}")
    rate = 5e-5 * (2000 / hidden_size) ** 0.781
    low, high = (1e-4, 2e-3) if lora else (1e-5, 1e-3)
    rate = min(high, max(low, rate * 10 if lora else rate))
    return float(f"{rate * _RATE_SHARES[method]:.3g}")


def beta(loss_type: str) -> float:
    """0.1, as in Rafailov et al. 2023; 2.0 for SimPO, whose rewards are means over tokens (Meng et al. 2024)."""
    return 2.0 if loss_type == "simpo" else 0.1


def gamma(loss_type: str) -> float:
    """1.0 for SimPO: half its beta, where Meng et al. 2024 suggest to start. Others have no margin."""
    return 1.0 if loss_type == "simpo" else 0.0


def label_smoothing() -> float:
    """0.1, as in Szegedy et al. 2016, with which the figures of `n_epochs` were measured."""
    return 0.1


def temperature() -> float:
    """0.05, as in Gao et al. 2021, "SimCSE", and sentence-transformers (scale 20)."""
    return 0.05


def lora_rank(hidden_size: int) -> int:
    """16, the usual middle: enough for data sets of this size (Hu et al. 2021 see no gain past 8 on most tasks), small
    enough to serve many adapters at once. Narrower models get their width."""
    return min(16, hidden_size)


def lora_alpha(*, rslora: bool) -> float:
    """32, whatever the rank: with it the best learning rate does not depend on the rank ("LoRA Without Regret").
    With rsLoRA 8, which at rank 16 scales alike, so that the same learning rate fits."""
    return 8.0 if rslora else 32.0


def precision(num_parameters: int, method: str = "supervised") -> Literal["fp32", "bf16"]:
    """bf16 from 50M parameters on. Smaller models train in seconds either way, and fp32 gives them the last digits and
    the same result on processors without bf16 instructions. Classifiers, which see ten times the examples, take bf16
    from 10M on."""
    least = _SMALL_CLASSIFIER if method == "classification" else _SMALL_MODEL
    return "bf16" if num_parameters >= least else "fp32"


def gradient_accumulation_steps(batch_size: int, num_workers: int, mean_tokens: float, method: str) -> int:
    """The fewest micro-batches per step that keep one at about 4,096 tokens: beyond that a device is busy anyway, and
    activations and logits only cost memory."""
    per_worker = ceil(batch_size / num_workers)
    least = _least_per_batch(method)
    per_micro_batch = max(least, int(MAX_MICRO_BATCH_TOKENS // max(mean_tokens, 1.0)))
    return max(1, min(ceil(per_worker / per_micro_batch), per_worker // least))


def eval_interval(total_steps: int, n_evals: int | None = None) -> int:
    """At most so many evaluations in a run; by default 15: enough points for a curve, a small share of the time."""
    return max(1, ceil(total_steps / (n_evals or 15)))


def checkpoint_interval(total_steps: int) -> int:
    """Five checkpoints in a run, so that a crash costs at most a fifth of it."""
    return max(1, ceil(total_steps / 5))


def method_settings(spec: TrainSpec) -> dict[str, Any]:
    """The settings of the spec's method, by its name, with numbers in place of every "auto"."""
    if (dpo := spec.dpo) is not None:
        found = {
            "beta": unless_given(dpo.beta, beta(dpo.loss_type)),
            "gamma": unless_given(dpo.gamma, gamma(dpo.loss_type)),
        }
        return {"dpo": dpo.model_copy(update=found)}
    if (labelled := spec.classification) is not None:
        found = {"label_smoothing": unless_given(labelled.label_smoothing, label_smoothing())}
        return {"classification": labelled.model_copy(update=found)}
    if (paired := spec.embedding) is not None:
        found = {"temperature": unless_given(paired.temperature, temperature())}
        return {"embedding": paired.model_copy(update=found)}
    return {}


def unless_given(value: Any, rule: Any) -> Any:
    """A value that was chosen, or what the rule says."""
    return rule if value == AUTO else value
