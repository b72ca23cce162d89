"""`python -m training spec.json --run-dir DIR`: one run without the service, also under torchrun.

Progress goes to DIR/progress.jsonl and, a line per step, to the terminal. Ctrl-C or SIGTERM makes a checkpoint and
stops; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from training.progress import EvalMetrics, Failed, Message, ProgressItem, Sample, StepMetrics, Wish
from training.spec import TrainSpec
from training.storage import Storage


class TerminalChannel:
    """Appends every item to a file, prints the ones to watch, and wishes for a stop after a signal."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._wish = Wish.GO_ON

    def send(self, items: list[ProgressItem]) -> Wish:
        """Write and print."""
        if items:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.writelines(item.model_dump_json() + "\n" for item in items)
        for item in items:
            print(describe(item), file=sys.stderr if isinstance(item, Failed) else sys.stdout, flush=True)
        return self._wish

    def stop_at_signals(self) -> None:
        """The first signal asks for a checkpoint and the end; a second one acts as usual."""

        def handler(number: int, frame: FrameType | None) -> None:
            self._wish = Wish.CHECKPOINT_AND_STOP
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)


def describe(item: ProgressItem) -> str:
    """One line for the terminal."""
    if isinstance(item, StepMetrics):
        return (
            f"step {item.step}/{item.total_steps}  loss {item.train_loss:.4f}  "
            f"accuracy {item.train_mean_token_accuracy:.3f}  rate {item.learning_rate:.2e}  "
            f"norm {item.grad_norm:.2f}  {item.tokens_per_s:.0f} tokens/s" + _means(item.means)
        )
    if isinstance(item, EvalMetrics):
        return f"validation after step {item.step}: loss {item.valid_loss:.4f}" + _means(item.means)
    if isinstance(item, Sample):
        return f"sample after step {item.step}: {item.prompt!r} -> {item.text!r}"
    if isinstance(item, Failed):
        return f"failed ({item.code}): {item.message}"
    if isinstance(item, Message):
        return item.text
    return f"{item.kind.replace('_', ' ')} of step {item.step}"


def _means(means: dict[str, float]) -> str:
    return "".join(f"  {name.replace('_', ' ')} {value:.3f}" for name, value in means.items())


def main() -> int:
    """Exit code 0 when the run finished or was stopped, 1 when it failed."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__.split("\n\n")[0])
    parser.add_argument("spec", type=Path, help="JSON file of a TrainSpec")
    parser.add_argument("--run-dir", required=True, help="folder of the run, inside the storage")
    parser.add_argument("--storage", default=".", help="folder or URL that the spec's keys refer to (default: .)")
    args = parser.parse_args()
    try:
        storage = Storage(args.storage)
        run_key = _key_of(storage, args.run_dir)
        spec = _read_spec(args.spec, storage)
    except (OSError, ValueError) as error:  # a missing file, a faulty spec or data that cannot be trained on
        print(f"cannot start: {error}", file=sys.stderr)
        return 1
    try:
        return _run(spec, storage, run_key)
    except (OSError, ValueError) as error:  # files that are not there, workers that are not as many as asked for
        print(f"failed: {error}", file=sys.stderr)
        return 1


def _run(spec: TrainSpec, storage: Storage, run_key: str) -> int:
    from training import loop
    from training.parallel import Workers

    num_started = Workers.join().size
    if not spec.least_workers() <= num_started <= spec.num_workers:
        raise ValueError(
            f"the spec asks for {spec.num_workers} workers, and {num_started} started: use torchrun "
            f"--nproc-per-node={spec.num_workers} -m training, or change num_workers"
        )
    if spec.parallel == "fsdp" and num_started == 1:
        raise ValueError(
            "one worker has nobody to share the weights with: use torchrun --nproc-per-node=2 -m training, or parallel "
            "'data'"
        )
    with tempfile.TemporaryDirectory(prefix="training-") as scratch_dir:
        folder = Path(storage.path(run_key)) if storage.is_local else Path()
        channel = TerminalChannel(folder / "progress.jsonl")
        channel.stop_at_signals()
        outcome = loop.run(spec, storage, run_key, channel, Path(scratch_dir))
    return 1 if outcome.status == "failed" else 0


def _key_of(storage: Storage, folder: str) -> str:
    """The run folder as a key. ValueError if it lies outside of the storage."""
    if storage.is_local:
        folder = Path(folder).resolve().relative_to(Path(storage.path("x")).parent.resolve()).as_posix()
    storage.path(folder)
    return folder


def _read_spec(file: Path, storage: Storage) -> TrainSpec:
    """The spec with its "auto" fields filled in."""
    spec = TrainSpec.model_validate_json(file.read_bytes())
    if spec.unresolved():
        from training.plan import plan

        spec = plan(spec, storage).spec
    return spec


if __name__ == "__main__":
    sys.exit(main())
