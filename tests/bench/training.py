"""Training beside TRL's SFTTrainer: the same rows, models, hyperparameters and loss (assistant tokens only).

A token counts, on both sides, when a loss is taken over it: ours by the run's own step metrics, theirs by the labels
that are not ignored after the shift. Speed is tokens over time from the end of step 2 to the end of the last one.
Each run is a process of its own, with all cores unless said otherwise; its peak memory is what the kernel says of it.

The peer's mode `best` packs rows to 512 tokens, in bf16, one packed row per micro-batch and without gradient
checkpointing. More rows per micro-batch are slower for it on a CPU: TRL flattens them into one row, and attention
then sees the square of their sum. Its mode `default` is 8 padded rows in fp32, with TRL's gradient checkpointing.

Parts, for `--only`: speed (with memory and validation loss), workers, curves (`loss_curve`) and stories (`stories`).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.bench import loss_curve, stories
from tests.bench.material import MAX_LENGTH, make_material
from tests.bench.processes import PEER, Speed, tokens_per_s, train, train_peer
from tests.bench.validation import valid_loss
from training.spec import Hyperparameters, LoraSpec, TrainSpec
from training.storage import Storage

GOALS = {
    "full_8m_vs_trl_best": ">= 3",
    "lora_8m_vs_trl_best": ">= 3",
    "full_110m_vs_trl_best": ">= 3",
    "lora_110m_vs_trl_best": ">= 3",
    "full_8m_vs_trl_default": ">= 6",
    "valid_loss_vs_trl": "<= 1.005",
    "two_workers_vs_one": ">= 1.7",
    "rss_vs_trl": "<= 1",
    **loss_curve.GOALS,
    **stories.GOALS,
}
RANK, ALPHA = 16, 32.0
NUM_VALID_ROWS = 200
NUM_WARMUP_STEPS = 2
PARTS = ("speed", "workers", "curves", "stories")


@dataclass(frozen=True)
class Case:
    """What both sides train: a model, how, and how much of the data in one epoch."""

    size: str
    lora: bool
    num_packed: int  # rows of 512 tokens per step of the peer; ours takes as many rows as have about these tokens
    num_micro_batches: int  # that ours makes of them, as many as keep its memory below the peer's
    num_steps: int

    @property
    def name(self) -> str:
        return f"{'lora' if self.lora else 'full'}_{self.size}"

    @property
    def learning_rate(self) -> float:
        return 1e-3 if self.size == "8m" else 3e-4


CASES = (
    Case("8m", lora=False, num_packed=8, num_micro_batches=4, num_steps=16),
    Case("8m", lora=True, num_packed=8, num_micro_batches=4, num_steps=8),
    Case("110m", lora=False, num_packed=4, num_micro_batches=4, num_steps=5),
    Case("110m", lora=True, num_packed=4, num_micro_batches=4, num_steps=5),
)
DEFAULT = Case("8m", lora=False, num_packed=0, num_micro_batches=1, num_steps=12)  # 8 rows per step on both sides
NUM_DEFAULT_ROWS = 8


def run(only: str | None = None) -> dict[str, float]:
    """The figures of all parts, or of one; needs the peer's environment."""
    if not PEER.exists():
        print("run `make peers` first", file=sys.stderr)
        raise SystemExit(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Storage(folder), Path(folder))
        figures: dict[str, float] = {}
        for part in PARTS if only is None else (only,):
            figures |= getattr(bench, part)()
        return figures


class _Bench:
    """One storage with the bases and rows that all runs share."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self.storage, self.folder = storage, folder
        self.bases, self.rows = make_material(storage)
        self.rows.write(Path(storage.path("files/valid")), 0, NUM_VALID_ROWS)

    def speed(self) -> dict[str, float]:
        """Both sides of each comparison, one directly after the other; then what they have learnt."""
        figures: dict[str, float] = {}
        rss_ratios = []
        for case in CASES:
            theirs, ours = self._theirs(case, best=True), self._ours(case)
            figures |= _compared(f"{case.name}_vs_trl_best", ours, theirs)
            rss_ratios.append(ours.rss_bytes / theirs.rss_bytes)
            figures[f"{case.name}_rss_vs_trl"] = rss_ratios[-1]
        figures["rss_vs_trl"] = max(rss_ratios)
        figures |= _compared("full_8m_vs_trl_default", self._ours(DEFAULT), self._theirs(DEFAULT, best=False))
        spec = self._spec(CASES[0], 1).model_copy(update={"training_key": "files/valid"})
        models = (self.folder / f"{side}/{CASES[0].name}" for side in ("ours", "theirs"))
        losses = [valid_loss(spec, self.storage, model) for model in models]
        return figures | {
            "valid_loss_vs_trl": losses[0] / losses[1],
            "valid_loss": losses[0],
            "trl_valid_loss": losses[1],
        }

    def workers(self) -> dict[str, float]:
        """Two workers beside one, each with one thread."""
        one, two = (self._ours(CASES[1], num_workers=number, num_threads=1) for number in (1, 2))
        return {"two_workers_vs_one": two.tokens_per_s / one.tokens_per_s}

    def curves(self) -> dict[str, float]:
        """Our fp32 losses beside those of a plain loop and of TRL."""
        rows = self.rows.lines[NUM_VALID_ROWS:]
        return loss_curve.LossCurves(self.storage, self.folder, self.bases["8m"], rows).figures()

    def stories(self) -> dict[str, float]:
        """A real model after one epoch beside TRL's."""
        return stories.compare(self.storage, self.folder)

    def _rows_per_step(self, case: Case) -> int:
        return self.rows.per_tokens(case.num_packed * MAX_LENGTH) if case.num_packed else NUM_DEFAULT_ROWS

    def _write_rows(self, case: Case) -> Path:
        path = Path(self.storage.path(f"files/{case.name}_{case.num_packed}"))
        self.rows.write(path, NUM_VALID_ROWS, case.num_steps * self._rows_per_step(case))
        return path

    def _ours(self, case: Case, num_workers: int = 1, num_threads: int = 0) -> Speed:
        name = f"{case.name}_{case.num_packed}_{num_workers}_{num_threads}"
        steps, took = train(self._spec(case, num_workers), self.folder, name, num_threads)
        if case is CASES[0] and not num_threads:
            self._keep(self.folder / "runs" / name / "artifact", self.folder / "ours" / case.name)
        return _speed([step["at"] for step in steps], [step["num_trained_tokens"] for step in steps], took.rss_bytes)

    def _keep(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)

    def _spec(self, case: Case, num_workers: int) -> TrainSpec:
        path = self._write_rows(case)
        hyper = Hyperparameters(
            n_epochs=1,
            batch_size=self._rows_per_step(case),
            learning_rate_multiplier=1.0,
            learning_rate=case.learning_rate,
            gradient_accumulation_steps=max(1, case.num_micro_batches // num_workers),
            max_length=MAX_LENGTH,
        )
        return TrainSpec(
            base=self.bases[case.size],
            training_key=f"files/{path.name}",
            adapter=LoraSpec(rank=RANK, alpha=ALPHA) if case.lora else None,
            hyperparameters=hyper,
            precision="bf16",
            num_workers=num_workers,
            eval_interval=1000,
            checkpoint_interval=1000,
        )

    def _theirs(self, case: Case, *, best: bool) -> Speed:
        settings = {
            "model": self.storage.path(self.bases[case.size].key),
            "rows": str(self._write_rows(case)),
            "output": str(self.folder / "theirs" / (case.name if best else "default")),
            "best": best,
            "lora_rank": RANK if case.lora else 0,
            "lora_alpha": ALPHA,
            "batch_size": case.num_packed or NUM_DEFAULT_ROWS,
            "accumulation": case.num_packed if best else 1,
            "gradient_checkpointing": not best,
            "max_length": MAX_LENGTH,
            "learning_rate": case.learning_rate,
            "max_steps": -1,
            "use_cpu": True,
            "model_options": {},
        }
        result, rss = train_peer(settings)
        return _speed(result["at"], result["num_tokens"], rss)


def _speed(at: list[float], num_tokens: list[int], rss_bytes: int) -> Speed:
    return Speed(tokens_per_s(at, num_tokens, NUM_WARMUP_STEPS), rss_bytes)


def _compared(name: str, ours: Speed, theirs: Speed) -> dict[str, float]:
    """The ratio, and what it is made of."""
    print(f"{name}: ours {ours}, theirs {theirs}", file=sys.stderr, flush=True)
    return {
        name: ours.tokens_per_s / theirs.tokens_per_s,
        f"{name}_tokens_per_s": ours.tokens_per_s,
        f"{name}_peer_tokens_per_s": theirs.tokens_per_s,
    }
