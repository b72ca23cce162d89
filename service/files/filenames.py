"""File names as clients send them: made safe to store and to send back. Never used as a path."""

from __future__ import annotations

import unicodedata
from urllib.parse import quote

MAX_LENGTH = 255
DEFAULT = "upload"
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # could make a name read as another


def clean(raw: bytes) -> str:
    """The last part of the name without what is not a character: control codes, broken UTF-8, direction marks."""
    text = raw.decode("utf-8", "replace").replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join(char for char in text if char not in _BIDI and unicodedata.category(char) not in _DROPPED).strip()
    return kept[:MAX_LENGTH] if kept not in ("", ".", "..") else DEFAULT


_DROPPED = ("Cc", "Cs", "Zl", "Zp")


def content_disposition(filename: str) -> str:
    """The header for a download: plain ASCII for old clients, the true name percent-encoded beside it (RFC 6266)."""
    plain = "".join(char if " " <= char <= "~" and char not in '"\\%' else "_" for char in filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
