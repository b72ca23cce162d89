"""Benchmarks that anyone can run: `python -m tests.bench NAME` prints a table and, last, one flat JSON object."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys

from rich.console import Console
from rich.table import Table

BENCHMARKS = ("classification", "gpu-serving", "gpu-training", "plan", "serving", "story", "training")


def main() -> None:
    """Run one benchmark and print its figures beside their goals."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--only", metavar="PART", help="one part of a benchmark that has parts")
    args = parser.parse_args()
    name, only = args.name, args.only
    benchmark = importlib.import_module(f"tests.bench.{name.replace('-', '_')}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers and folders go with a benchmark that is ended
    parts = getattr(benchmark, "PARTS", ())
    if only is not None and only not in parts:
        parser.error(f"{name} has no part {only!r}; its parts: {', '.join(parts) or 'none'}")
    figures: dict[str, float] = benchmark.run() if only is None else benchmark.run(only)
    table = Table("figure", "measured", "goal", title=name)
    for key, value in figures.items():
        table.add_row(key, f"{value:.3g}", benchmark.GOALS.get(key, ""))
    if figures:
        Console().print(table)
    print(json.dumps({key: float(f"{value:.5g}") for key, value in figures.items()}))


if __name__ == "__main__":
    main()
