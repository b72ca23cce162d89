"""vLLM keeps the promises of an engine, where `make peers` has built its environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".peers/vllm/bin/python"


@pytest.mark.long
@pytest.mark.skipif(not PYTHON.exists(), reason="`make peers` has not built vLLM's environment")
def test_vllm_passes_the_tests_that_all_engines_pass() -> None:
    """In its own environment, because it wants other versions of transformers and FastAPI than ours."""
    command = [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engine/test_conformance.py", "-k"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([*command, "vllm"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "17 passed" in done.stdout
