"""Real models and data beside the checkout, when they are there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODELS = SHARED / "models"
DATA = SHARED / "data"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real models and data is absent")
TUNESMITH = str(Path(sys.executable).with_name("tunesmith"))  # the command as it was installed beside this Python
