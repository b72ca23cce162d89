"""vLLM without HTTP, for `tests.bench serving`: as our own engine is measured in `tests.bench.engine_alone`.

`python vllm_generate.py SETTINGS`, with the same JSON object; prints one with `ready_s` and `tokens_per_s`, and vLLM
prints lines of its own around it.
"""

import json
import sys
import time
from pathlib import Path

import psutil
from vllm import LLM, SamplingParams


def main(settings: dict) -> None:
    """Load, warm up, measure."""
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(Path(settings["prompts"]).read_text())]
    batch_size, num_tokens = settings["batch_size"], settings["num_tokens"]
    llm = LLM(settings["model"], dtype="bfloat16", max_model_len=1024, max_num_seqs=batch_size)
    ready_s = time.time() - psutil.Process().create_time()
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    llm.generate(prompts[:batch_size], sampling, use_tqdm=False)
    measured = prompts[batch_size:]
    started = time.perf_counter()
    answers = llm.generate(measured, sampling, use_tqdm=False)
    elapsed = time.perf_counter() - started
    num_generated = sum(len(answer.outputs[0].token_ids) for answer in answers)
    assert num_generated == num_tokens * len(measured), "an answer ended early"
    print(json.dumps({"ready_s": ready_s, "tokens_per_s": num_generated / elapsed}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
