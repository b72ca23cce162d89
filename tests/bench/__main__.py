"""Benchmarks that anyone can run: `python -m tests.bench NAME` prints a table and, last, one flat JSON object."""

from __future__ import annotations

import argparse
import importlib
import json

from rich.console import Console
from rich.table import Table

BENCHMARKS = ("classification", "gpu-training", "plan", "story", "training")


def main() -> None:
    """Run one benchmark and print its figures beside their goals."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    name = parser.parse_args().name
    benchmark = importlib.import_module(f"tests.bench.{name.replace('-', '_')}")
    figures: dict[str, float] = benchmark.run()
    table = Table("figure", "measured", "goal", title=name)
    for key, value in figures.items():
        table.add_row(key, f"{value:.3g}", benchmark.GOALS.get(key, ""))
    if figures:
        Console().print(table)
    print(json.dumps({key: float(f"{value:.5g}") for key, value in figures.items()}))


if __name__ == "__main__":
    main()
