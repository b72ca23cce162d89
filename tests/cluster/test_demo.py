"""`tunesmith demo` as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import await_value
from tests.shared import TUNESMITH

pytestmark = pytest.mark.long


def processes_of(home: Path) -> list[psutil.Process]:
    """Everything on this machine that was started for the home, however it was detached."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TUNESMITH_TEST_MARK") == str(home):
                found.append(process)
        except psutil.Error:
            continue  # ended meanwhile
    return found


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The running command; its processes carry a mark, so that leftovers are found."""
    process = subprocess.Popen(
        [TUNESMITH, "demo", "--home", str(tmp_path)],
        env=os.environ | {"TUNESMITH_TEST_MARK": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process
    process.kill()
    process.wait()


def test_the_demo_teaches_its_answers_and_leaves_no_process(demo: subprocess.Popen[str], tmp_path: Path) -> None:
    said, _ = demo.communicate(timeout=400)
    assert demo.returncode == 0, said
    assert "loss" in said and "4 of 4 answers of the tuned model are the taught ones." in said
    assert "Traceback" not in said and "WARNING" not in said
    await_value(lambda: not processes_of(tmp_path), "no process left", 30)


@pytest.mark.parametrize("first_words", ["Ready at", "lumora.jsonl: "], ids=["base", "job"])
def test_ctrl_c_ends_the_demo_and_leaves_no_process(
    demo: subprocess.Popen[str], tmp_path: Path, first_words: str
) -> None:
    """While the base is made, and when the job begins."""
    assert demo.stdout is not None
    for line in demo.stdout:
        if first_words in line:
            break
    demo.send_signal(signal.SIGINT)
    said, _ = demo.communicate(timeout=120)
    assert demo.returncode == 130, said
    assert "Traceback" not in said
    await_value(lambda: not processes_of(tmp_path), "no process left", 30)
