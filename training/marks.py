"""Marks: private-use characters planted in messages, to see where a chat template puts them.

Knows messages and text, not templates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
_FIRST, _LAST = 0x100000, 0x10FFFD  # plane 16, private use


@dataclass(frozen=True)
class Conversation:
    """Messages and tools in the form that templates take, user text sanitised."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None


def free_marks(text: str, num_marks: int) -> int | None:
    """The first of `num_marks` private-use characters in a row that the text does not use."""
    for base in range(_FIRST, min(_LAST - num_marks, _FIRST + 16 * num_marks), num_marks or 1):
        if not re.search(f"[{chr(base)}-{chr(base + num_marks)}]", text):
            return base
    return None


def plant(chat: Conversation, base: int) -> tuple[Conversation, list[tuple[str, int]]]:
    """Messages with a mark at both ends of each content (inside its outer white space, which templates strip) and
    behind each function name; and what each mark stands for."""
    meanings: list[tuple[str, int]] = []

    def mark(kind: str, index: int) -> str:
        meanings.append((kind, index))
        return chr(base + len(meanings) - 1)

    messages = []
    for index, message in enumerate(chat.messages):
        copy, content = dict(message), message.get("content", "")
        if core := content.strip():
            left, right = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
            copy["content"] = left + mark("start", index) + core + mark("end", index) + right
        if message.get("tool_calls"):
            copy["tool_calls"] = [renamed(call, mark("call", index)) for call in message["tool_calls"]]
        messages.append(copy)
    tools = None if chat.tools is None else [renamed(tool, mark("tool", i)) for i, tool in enumerate(chat.tools)]
    return Conversation(messages, tools), meanings


def read_marks(marked: str, base: int, num_marks: int) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and each mark's number and position in that text."""
    found = []
    for count, match in enumerate(re.finditer(f"[{chr(base)}-{chr(base + num_marks)}]", marked)):
        found.append((ord(match.group()) - base, match.start() - count))
    return re.sub(f"[{chr(base)}-{chr(base + num_marks)}]", "", marked), found


def renamed(tool: dict[str, Any], suffix: str = "_other") -> dict[str, Any]:
    """A tool or a tool call whose function has a longer name."""
    function = tool.get("function")
    if not isinstance(function, dict):
        return {**tool, "name": f"{tool.get('name', '')}{suffix}"}
    return {**tool, "function": {**function, "name": f"{function.get('name', '')}{suffix}"}}


def common_prefix(texts: list[str]) -> int:
    """Number of leading characters that all texts share."""
    low, high = min(texts), max(texts)
    for position, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return position
    return len(low)
