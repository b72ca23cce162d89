"""`python -m service.engine MODEL_FOLDER`: one answer of a model at the terminal, without Ray or HTTP.

A language model continues the prompt, a classifier tells its labels' probabilities, an encoder an embedding.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from pathlib import Path

from tokenizers import Tokenizer

from service.engine.encoder import EncoderEngine, EncoderTask
from service.engine.native.engine import NativeEngine
from service.engine.protocol import AdapterRef, GenerateRequest, SamplingParams


def main() -> None:
    """Read the command line and answer once."""
    parser = argparse.ArgumentParser(prog="python -m service.engine", description=__doc__)
    parser.add_argument("folder", type=Path, help="model folder: config.json, model.safetensors, tokenizer.json")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--adapter", type=Path, help="LoRA folder: adapter_config.json, adapter_model.safetensors")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    args = parser.parse_args()
    own = args.adapter if args.adapter and (args.adapter / "config.json").is_file() else args.folder
    architecture = json.loads((own / "config.json").read_text())["architectures"][0]
    asyncio.run(_generate(args) if architecture.endswith("ForCausalLM") else _encode(args, architecture))


async def _encode(args: argparse.Namespace, architecture: str) -> None:
    """Load, and print the row of the prompt."""
    task: EncoderTask = "classify" if architecture.endswith("ForSequenceClassification") else "embed"
    engine = EncoderEngine(args.folder, task=task, dtype=args.dtype, adapter=args.adapter)
    await engine.start()
    try:
        ids = tuple(Tokenizer.from_file(str(args.folder / "tokenizer.json")).encode(args.prompt).ids)
        (row,) = (await engine.encode([ids])).tolist()
    finally:
        await engine.stop()
    if task == "embed":
        print(json.dumps(row))
    for label, log_probability in sorted(zip(engine.labels, row, strict=False), key=lambda pair: -pair[1]):
        print(f"{math.exp(log_probability):.4f} {label}")


async def _generate(args: argparse.Namespace) -> None:
    """Load, stream, report the speed."""
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    engine = NativeEngine(
        args.folder,
        tokenizer=tokenizer,
        dtype=args.dtype,
        max_batch_size=1,
        stop_token_ids=_stop_token_ids(args.folder),
    )
    await engine.start()
    sampling = SamplingParams(args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    adapter = AdapterRef(args.adapter.name, args.adapter) if args.adapter else None
    request = GenerateRequest("terminal", tuple(tokenizer.encode(args.prompt).ids), sampling, adapter=adapter)
    num_tokens, started = 0, time.perf_counter()
    try:
        async for deltas in engine.generate(request):
            for delta in deltas:
                num_tokens += delta.num_tokens
                print(delta.text, end="", flush=True)
        print(f"\n[{num_tokens} tokens, {num_tokens / (time.perf_counter() - started):.0f} tokens/s]")
    finally:
        await engine.stop()


def _stop_token_ids(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids from the generation config, else from the model's."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        eos = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return ()


if __name__ == "__main__":
    main()
