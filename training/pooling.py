"""How an encoder's token states become one embedding: what a folder in sentence-transformers' layout says of it.

`modules.json` lists the steps: the transformer, pooling (`1_Pooling/config.json`), and perhaps normalisation to unit
length (`2_Normalize`). A folder without it is pooled by the mean and normalised. Read by training and by serving alike;
knows no torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from training.spec import Contract

MODULES = "modules.json"
LIMITS = "sentence_bert_config.json"
_KEPT = (MODULES, LIMITS, "config_sentence_transformers.json")
POOLING_PATTERNS = (*_KEPT, "*_Pooling/config.json")  # the same files as patterns, for a download
_STEP_FOLDER = re.compile(r"\d+_[A-Za-z]+")
_MODES: dict[str, Literal["mean", "cls", "max"]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


class PoolingError(ValueError):
    """The folder asks for something that is not done here; the message is for the user."""


class Pooling(Contract):
    """From token states to an embedding."""

    mode: Literal["mean", "cls", "max"] = "mean"  # over all tokens, special ones included
    normalize: bool = True  # to unit length
    max_length: int | None = None  # tokens; None where the folder sets no limit of its own


def read_pooling(folder: Path) -> Pooling:
    """What the folder says. PoolingError if it has a step or a mode that is unknown here."""
    limit = _read(folder / LIMITS).get("max_seq_length") if (folder / LIMITS).is_file() else None
    max_length = limit if isinstance(limit, int) and limit > 0 else None
    if not (folder / MODULES).is_file():
        return Pooling(max_length=max_length)
    steps = _steps(folder)
    kinds = [kind for kind, _ in steps]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise PoolingError(f"{MODULES} lists {', '.join(kinds)}; a transformer, pooling and Normalize can be run here")
    mode = _mode(_read(folder / steps[1][1] / "config.json"))
    return Pooling(mode=mode, normalize=kinds[2:] == ["Normalize"], max_length=max_length)


def pooling_files(folder: Path) -> list[str]:
    """Names, relative to the folder, of the files that `read_pooling` and sentence-transformers read."""
    names = [name for name in _KEPT if (folder / name).is_file()]
    if MODULES not in names:
        return names
    steps = [f"{path}/config.json" for _, path in _steps(folder) if path]
    return names + [name for name in steps if (folder / name).is_file()]


def _steps(folder: Path) -> list[tuple[str, str]]:
    """Kind and subfolder of each step, in order; the transformer's is empty."""
    steps = []
    for entry in _read_any(folder / MODULES, list):
        kind, path = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str) or not (path == "" or _STEP_FOLDER.fullmatch(path)):
            raise PoolingError(f"{MODULES} has an entry that is not understood: {str(entry)[:200]}")
        steps.append((kind.rpartition(".")[2], path))
    return steps


def _mode(config: dict[str, Any]) -> Literal["mean", "cls", "max"]:
    named = config.get("pooling_mode")  # newer folders name it, older ones have a flag for each
    chosen = [named] if isinstance(named, str) else [key for key in config if key.startswith("pooling_mode_")]
    chosen = [key for key in chosen if key == named or config[key] is True]
    modes = [_MODES.get(key, key) for key in chosen]
    if len(modes) != 1 or modes[0] not in _MODES.values():
        raise PoolingError(f"the pooling is {', '.join(modes) or 'not said'}; one of mean, cls and max can be run here")
    return modes[0]  # type: ignore[return-value]  # it was just found among the known ones


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = _read_any(path, dict)
    return found


def _read_any(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PoolingError(f"{path.name} is missing") from None
    except ValueError as error:
        raise PoolingError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise PoolingError(f"{path.name} is not understood: no JSON {'object' if kind is dict else 'array'}")
    return value
