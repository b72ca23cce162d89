"""Decoding on one GPU: a random Llama of 1B parameters in bf16, without Ray or HTTP, at batch 1, 32 and 256.

Each side runs in a process of its own on prompts of 128 tokens and writes 256, greedily; no answer ends early (see
`serving_material`). Decode speed is that of the time in which all sequences of the batch decode: from when the last one
has its first token until the first one has its last.

The limit at batch 1 is the memory's: each token reads all weights (the embedding once, as the head) and the keys and
values so far, at most at the speed at which a large copy reads and writes, measured in the same run. `gpu_limit_b1` is
the share of it that was reached. The peer is transformers' continuous batching (`generate_batch`) on the same model.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.bench.engine_alone import Settings
from tests.bench.gpu_training import LLAMA_1B
from tests.bench.servers import NUM_THREADS, last_figures
from tests.bench.serving_material import Prompts, make_model, save_adapters

GOALS = {
    "gpu_limit_b1": ">= 0.5",
    "gpu_vs_transformers_b256": ">= 2",
    "gpu_adapters32_vs_base_b32": ">= 0.7",
    "gpu_adapters32_vs_base_b256": ">= 0.7",
}
BATCH_SIZES = (1, 32, 256)
NUM_PROMPT_TOKENS, NUM_TOKENS = 128, 256
NUM_ADAPTERS = 32
COPY_BYTES, NUM_COPIES = 4 << 30, 20
BF16_BYTES = 2


def run() -> dict[str, float]:
    """All figures; none where there is no GPU."""
    if not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is false), so there is nothing to measure.")
        return {}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    bytes_per_s = copy_bytes_per_s(torch.device("cuda"))
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder), LLAMA_1B, bytes_per_s)


def measure(folder: Path, config: dict[str, Any], bytes_per_s: float) -> dict[str, float]:
    """All figures of a model, on whatever device is here; `bytes_per_s` is the memory's speed."""
    model = make_model(folder, "base", config)
    prompts = Prompts(model)
    adapters = [str(path) for path in save_adapters(model, folder / "adapters", NUM_ADAPTERS)]
    figures = {"memory_gigabytes_per_s": bytes_per_s / 1e9}
    for batch_size in BATCH_SIZES:
        file = folder / f"prompts-{batch_size}.json"
        file.write_text(json.dumps(prompts.token_ids(2 * batch_size, NUM_PROMPT_TOKENS)))
        settings = Settings(str(model), str(file), batch_size, NUM_TOKENS, NUM_THREADS)
        ours = _decode_speed("tests.bench.engine_alone", settings)
        theirs = _decode_speed("tests.bench.transformers_alone", settings)
        figures |= {
            f"gpu_tokens_per_s_b{batch_size}": ours,
            f"gpu_transformers_tokens_per_s_b{batch_size}": theirs,
            f"gpu_vs_transformers_b{batch_size}": ours / theirs,
        }
        if batch_size == 1:
            figures["gpu_limit_b1"] = ours * bytes_per_token(model, config) / bytes_per_s
        else:
            settings = Settings(str(model), str(file), batch_size, NUM_TOKENS, NUM_THREADS, adapters)
            with_adapters = _decode_speed("tests.bench.engine_alone", settings)
            figures[f"gpu_adapters32_tokens_per_s_b{batch_size}"] = with_adapters
            figures[f"gpu_adapters32_vs_base_b{batch_size}"] = with_adapters / ours
        print(f"batch {batch_size}: {ours:.0f} tokens/s, transformers {theirs:.0f}", flush=True)
    return figures


def bytes_per_token(model: Path, config: dict[str, Any]) -> float:
    """What one sequence reads for a token, on average over its answer: weights, keys and values."""
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    head_size = config["hidden_size"] // config["num_attention_heads"]
    per_position = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_size * BF16_BYTES
    return weights + per_position * (NUM_PROMPT_TOKENS + NUM_TOKENS / 2)


def copy_bytes_per_s(device: torch.device, num_bytes: int = COPY_BYTES) -> float:
    """Bytes read and written per second by copies of a large tensor: the fastest of several."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(NUM_COPIES):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * num_bytes / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _decode_speed(module: str, settings: Settings) -> float:
    command = [sys.executable, "-m", module, json.dumps(asdict(settings))]
    speed = last_figures(command)["decode_tokens_per_s"]
    assert speed > 0, f"{module}: the first answer ended before the last one began; decode more tokens"
    return speed
