"""Validation faults in OpenAI's words: one sentence that names the field, its dotted path, and a code to branch on."""

from __future__ import annotations

from typing import Any, Final

from fastapi.exceptions import RequestValidationError

from service.errors import InvalidRequest, ServiceError, UnsupportedParameter

# A validator of ours raises PydanticCustomError(<one of these>, message) and the message goes out as it is.
OWN_CODES: Final = frozenset(
    {"unsupported_parameter", "invalid_value", "unknown_parameter", "missing_required_parameter"}
)

_TYPE_NAMES: Final = {
    "string": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "list": "an array",
    "tuple": "an array",
    "dict": "an object",
    "model": "an object",
    "model_attributes": "an object",
    "mapping": "an object",
}
_JSON_NAMES: Final = (
    (bool, "a boolean"),
    (int, "an integer"),
    (float, "a number"),
    (str, "a string"),
    (list, "an array"),
)

Error = dict[str, Any]


def explain(error: RequestValidationError) -> ServiceError:
    """The one fault to report. Of a union's faults, those deepest in the body tell the most."""
    found = [(_path(fault, error.body), fault) for fault in error.errors()]
    first = found[0][0][:1]
    same_field = [(path, fault) for path, fault in found if path[:1] == first]
    deepest = max(len(path) for path, _ in same_field)
    path, fault = next((path, fault) for path, fault in same_field if len(path) == deepest)
    faults = [other for other_path, other in same_field if other_path == path]
    return _describe(".".join(path), fault, faults)


def _path(fault: Error, body: Any) -> tuple[str, ...]:
    """The location without the names of union members, which mean nothing to a client."""
    loc: tuple[int | str, ...] = fault["loc"]
    if not loc or loc[0] != "body":
        return tuple(str(part) for part in loc[1:])
    kept: list[str] = []
    value = body
    for index, part in enumerate(loc[1:], start=2):
        is_absent = index == len(loc) and fault["type"] == "missing"
        if isinstance(value, dict) and isinstance(part, str) and (part in value or is_absent):
            kept.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            kept.append(str(part))
            value = value[part] if part < len(value) else None
    return tuple(kept)


def _describe(name: str, fault: Error, faults: list[Error]) -> ServiceError:
    kind: str = fault["type"]
    if kind in ("json_invalid", "json_type"):
        reason = fault.get("ctx", {}).get("error", "it is not JSON")
        return InvalidRequest(f"The request body is not valid JSON: {reason}.", code="invalid_json")
    if not name:
        return InvalidRequest(
            "The request body must be a JSON object, sent with the header 'Content-Type: application/json'.",
            code="invalid_type",
        )
    if kind == "missing":
        return InvalidRequest(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return InvalidRequest(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    if kind in OWN_CODES:
        of = UnsupportedParameter if kind == "unsupported_parameter" else InvalidRequest
        return of(str(fault["msg"]), param=name, code=kind)
    expected = _expected_types(faults)
    if expected:
        got = _json_name(fault.get("input"))
        message = f"Invalid type for '{name}': expected {expected}, but got {got} instead."
        return InvalidRequest(message, param=name, code="invalid_type")
    of_value = [other for other in faults if not _type_name(other)]
    if all(other["type"] == "literal_error" for other in of_value):
        of_value = faults  # '3' for an integer or 'auto': neither the type nor the one word alone tells what is right
    reasons = dict.fromkeys(map(_reason, of_value))
    return InvalidRequest(f"Invalid value for '{name}': {', or '.join(reasons)}.", param=name, code="invalid_value")


def _expected_types(faults: list[Error]) -> str:
    """What a value of a wrong type should have been; empty if its type was right for some member of the union."""
    wrong = [name for fault in faults if (name := _type_name(fault))]
    rest = [fault for fault in faults if not _type_name(fault)]
    if not wrong or any(fault["type"] != "literal_error" or isinstance(fault.get("input"), str) for fault in rest):
        return ""
    literals = [f"one of {fault['ctx']['expected']}" for fault in rest]
    return " or ".join(dict.fromkeys(wrong + literals))


def _type_name(fault: Error) -> str | None:
    """'an integer' for faults such as int_type, int_parsing or int_from_float; None for faults of value."""
    kind: str = fault["type"]
    for suffix in ("_type", "_parsing", "_from_float"):
        if kind.endswith(suffix):
            return _TYPE_NAMES.get(kind.removesuffix(suffix))
    return None


def _reason(fault: Error) -> str:
    if (name := _type_name(fault)) is not None:
        return f"it must be {name}"
    if fault["type"] == "literal_error":
        return f"it must be {fault['ctx']['expected']}"
    if fault["type"] == "string_unicode":
        return "it must not contain half of a surrogate pair, which is no character"
    if fault["type"] in ("value_error", "assertion_error"):
        return str(fault.get("ctx", {}).get("error") or fault["msg"]).rstrip(".")
    message = str(fault["msg"]).removeprefix("Input should ").removeprefix("Value should ")
    message = message.removeprefix("String should ").removeprefix("List should ").removeprefix("Dictionary should ")
    message = message.removeprefix("Tuple should ").replace(" after validation", "")
    return f"it should {message}" if message != fault["msg"] else message[:1].lower() + message[1:]


def _json_name(value: Any) -> str:
    if value is None:
        return "null"
    return next((name for kind, name in _JSON_NAMES if isinstance(value, kind)), "an object")
