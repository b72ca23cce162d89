"""transformers' continuous batching in a process of its own, as our engine is measured in `tests.bench.engine_alone`.

`python -m tests.bench.transformers_alone SETTINGS`, with the same JSON object but for adapters and threads; the first
round warms up. Prints a JSON object with `decode_tokens_per_s`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.bench.engine_alone import Settings, decode_tokens_per_s


def main(settings: Settings) -> None:
    """Load, warm up, measure."""
    prompts = json.loads(Path(settings.prompts).read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16).to(device)
    config = GenerationConfig(max_new_tokens=settings.num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for first in (0, settings.batch_size):
        answers = model.generate_batch(
            prompts[first : first + settings.batch_size],
            generation_config=config,
            record_timestamps=True,
            persistent_manager=True,  # what the warm-up made stays
        )
    times = [answer.timestamps for answer in answers.values()]
    assert all(len(one) == settings.num_tokens for one in times), "an answer ended early"
    print(json.dumps({"decode_tokens_per_s": decode_tokens_per_s(times)}))


if __name__ == "__main__":
    main(Settings(**json.loads(sys.argv[1])))
