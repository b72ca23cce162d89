"""`python -m training` says in one line why it cannot do what it was asked."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.runs import BASE_KEY, Recorder, make_base, make_spec, write_rows
from training.__main__ import main
from training.loop import run
from training.progress import Wish
from training.spec import TrainSpec
from training.storage import Storage


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A run takes them over, and its process ends with it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def fails(storage: Storage, spec: TrainSpec, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Run to the failure; what it said on stderr."""
    file = Path(storage.path("spec.json"))
    file.write_text(spec.model_dump_json())
    arguments = [str(file), "--run-dir", storage.path("runs/one"), "--storage", storage.url]
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    capfd.readouterr()
    assert main() == 1
    return capfd.readouterr().err.strip().splitlines()[-1]


def test_workers_that_did_not_start_are_missed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(storage, make_base(storage), num_workers=2)
    for asked in (spec, spec.model_copy(update={"parallel": "fsdp"})):
        said = fails(storage, asked, monkeypatch, capfd)
        assert "asks for 2 workers, and 1 started" in said
        assert "torchrun --nproc-per-node=2" in said
    assert not storage.list_names("runs")


@pytest.mark.parametrize("fields", [{}, {"num_workers": 2, "min_workers": 1}], ids=["fixed", "elastic"])
def test_weights_cannot_be_shared_by_one_worker(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fields: dict[str, int]
) -> None:
    spec = make_spec(storage, make_base(storage), lora=False, parallel="fsdp", **fields)
    said = fails(storage, spec, monkeypatch, capfd)
    assert "one worker has nobody to share the weights with" in said
    assert "torchrun --nproc-per-node=2" in said


def test_data_that_changed_since_the_checkpoint_are_told(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(storage, make_base(storage))
    run(spec, storage, "runs/one", Recorder(Wish.CHECKPOINT_AND_STOP, at_step=1), tmp_path / "scratch")
    write_rows(storage, spec.training_key, 17)
    said = fails(storage, spec, monkeypatch, capfd)
    assert said == "failed (data_changed): The data changed since the last checkpoint: start a new run."


def test_the_spec_in_the_readme_is_all_that_a_run_needs(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """But for its two workers."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (text,) = re.findall(r"```json\n(\{\"base\": .*)\n```", readme)
    spec = {**json.loads(text), "num_workers": 1}
    make_base(storage)
    shutil.copytree(storage.path(BASE_KEY), storage.path(spec["base"]["key"]))
    shutil.move(storage.path(write_rows(storage, "files/train")), storage.path(spec["training_key"]))
    file = Path(storage.path("spec.json"))
    file.write_text(json.dumps(spec))
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "argv", ["training", str(file), "--run-dir", "run"])
    assert main() == 0
    assert (file.parent / "run/artifact/adapter_model.safetensors").exists()
    assert "artifact of step" in capfd.readouterr().out


@pytest.mark.parametrize("lost", ["files/train", "bases/tiny/model.safetensors"])
def test_files_that_are_gone_are_named(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], lost: str
) -> None:
    spec = make_spec(storage, make_base(storage))
    Path(storage.path(lost)).unlink()
    assert lost.rpartition("/")[2] in fails(storage, spec, monkeypatch, capfd)
