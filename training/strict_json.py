"""One line of JSONL to Python, strictly, with faults in a user's words.

Stricter than `json.loads`: no repeated keys, no NaN or Infinity, no lone surrogates, bounded nesting and length.
Also the small readers that check one field at a time. What a line means is the business of `training.records`.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Any, NoReturn

MAX_LINE_BYTES = 10 << 20
MAX_DEPTH = 64  # far beyond any tool schema, far below what recursive code downstream can bear
_BOM = b"\xef\xbb\xbf"
_FOREIGN = {
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"PK\x03\x04": "a zip file; unpack it first",
    b"PAR1": "a Parquet file; export it as JSONL first",
}


class Fault(ValueError):
    """What is wrong with a line, as a sentence for the person who wrote it."""


def show(value: object, limit: int = 40) -> str:
    """A value for an error message: as JSON, cut short, printable whatever it holds."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text.encode("utf-8", "replace").decode()


def decode(line: bytes, *, first: bool = False) -> Any:
    """The JSON value of one line; `first` allows a byte order mark and looks for files that are no text at all."""
    if len(line) > MAX_LINE_BYTES:
        raise Fault(f"the line is longer than {MAX_LINE_BYTES >> 20} MB; one record must be smaller")
    if first:
        for magic, name in _FOREIGN.items():
            if line.startswith(magic):
                raise Fault(f"this is {name}")
        line = line.removeprefix(_BOM)
    try:
        text = line.decode("utf-8").strip(" \t\r\n")
    except UnicodeDecodeError as error:
        raise Fault(f"not valid UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from None
    if not text:
        raise Fault("the line is empty; one JSON object is needed")
    value = _parse(text, first)
    if text.count("{") + text.count("[") > MAX_DEPTH and isinstance(value, dict | list):
        _check_depth(value)
    if "\\ud" in text or "\\uD" in text:  # UTF-8 itself holds no lone surrogate, only an escape can bring one
        _check_surrogates(value)
    return value


def _parse(text: str, first: bool) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Fault(_explain(text, error, first)) from None
    except RecursionError:
        raise Fault(f"nested deeper than {MAX_DEPTH} levels") from None
    except Fault:
        raise
    except ValueError:  # Python refuses to read integers of more than a few thousand digits
        raise Fault("a number has too many digits") from None


def _explain(text: str, error: json.JSONDecodeError, first: bool) -> str:
    if text[0] == "[":
        return ARRAY
    if text[0] != "{":
        csv = " (this looks like CSV)" if first and ("," in text or "\t" in text) else ""
        return f"not a JSON object: the line starts with {show(text[:24])}{csv}; each line must be one {{…}} object"
    if error.msg == "Extra data":
        return f"something follows the JSON object at column {error.colno}; put each object on its own line"
    if error.pos >= len(text):
        return "the JSON object does not end on this line; write each object on one line, e.g. with: jq -c ."
    if error.msg.startswith("Unterminated string"):
        return f"the string that starts at column {error.colno} is not closed; write a line break inside it as \\n"
    hint = "; strings and keys need double quotes" if text[error.pos] == "'" else ""
    near, what = show(text[error.pos : error.pos + 16]), error.msg.removesuffix(" at")
    return f"not valid JSON at column {error.colno}, near {near}: {what}{hint}"


ARRAY = "this is a JSON array; one JSON object per line is needed, e.g. with: jq -c '.[]' file.json > file.jsonl"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Fault(f"the key {show(key)} appears twice in one object; keep one of them")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise Fault(f"{name} is not JSON; use a number or null")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise Fault(f"the number {digits[:20]} is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)


def _check_depth(value: Any) -> None:
    """Bound the nesting; a loop, so that depth cannot hurt it."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            below.extend(item.values() if isinstance(item, dict) else item)
        level = [item for item in below if isinstance(item, dict | list)]
        if not level:
            return
    raise Fault(f"nested deeper than {MAX_DEPTH} levels")


def _check_surrogates(value: Any) -> None:
    """Refuse text that no UTF-8 can hold. The depth is bounded by now."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise Fault(f"{code} is half of a surrogate pair; write the character itself or both halves") from None


def require(condition: object, message: str) -> None:
    """Fault with this message unless the condition holds."""
    if not condition:
        raise Fault(message)


def check_keys(value: dict[str, Any], path: str, allowed: tuple[str, ...], where: str = "") -> None:
    """Refuse unknown keys by name: a key that we would ignore is a wish that we would not honour."""
    for key in value:
        if key not in allowed:
            close = get_close_matches(key[:64], allowed, n=1)
            advice = f"did you mean {show(close[0])}?" if close else f"known keys: {', '.join(allowed)}"
            raise Fault(f"{path + ': ' if path else ''}unknown key {show(key)}{where}; {advice}")


def filled_list(value: Any, path: str) -> list[Any]:
    """The value as a list with something in it."""
    require(isinstance(value, list), f"{path}: must be a list")
    require(value, f"{path}: the list is empty")
    assert isinstance(value, list)
    return value


def text_field(value: dict[str, Any], path: str, key: str) -> str:
    """A key that must be there and hold a string."""
    full = f"{path}.{key}" if path else key
    require(key in value, f"{full}: missing")
    text = value[key]
    if not isinstance(text, str):
        raise Fault(f"{full}: {show(text)} is not text; it must be a string")
    return str(text)


def filled_field(value: dict[str, Any], path: str, key: str) -> str:
    """A key that must hold a string that is not empty."""
    text = text_field(value, path, key)
    require(text, f"{path}.{key}: must not be empty")
    return text


def optional_text(value: dict[str, Any], path: str, key: str) -> str | None:
    """A key that may be absent or null, or else holds a string."""
    return None if value.get(key) is None else text_field(value, path, key)


def rename_hint(item: dict[str, Any], renames: dict[str, str]) -> str:
    """Advice when a missing key is there under another system's name."""
    return next((f"; rename {show(old)} to {show(new)}" for old, new in renames.items() if old in item), "")
