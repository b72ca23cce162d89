"""Folders of tiny models, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.models import CONFIGS, save_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per kind of tiny model."""
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, root / kind) for kind in CONFIGS}
