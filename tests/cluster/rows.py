"""Training rows made from the real data sets, short enough for the small models' contexts."""

from __future__ import annotations

import json
from typing import Any

from tests.shared import DATA


def chat_rows(num: int) -> list[dict[str, Any]]:
    """Instructions and answers of the Alpaca sample as chat rows."""
    rows = json.loads((DATA / "llamafactory" / "alpaca_en_demo.json").read_text())
    short = [row for row in rows if not row["input"] and len(row["instruction"] + row["output"]) < 240]
    return [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in short[:num]
    ]


def text_rows(num: int) -> list[dict[str, Any]]:
    """Paragraphs of short stories as plain text rows."""
    stories = (DATA / "tinystories-val" / "tinystories_val.txt").read_text().split("\n\n")
    return [{"text": story.strip()[:300]} for story in stories if len(story.strip()) > 100][:num]
