"""The commands around what is registered: models, bases, aliases, keys."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

import openai
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.cli.client import console, errors, get, listed, post

POLL_S = 0.5
WIDEST = 1000  # columns that a table may take


def table(*columns: str) -> Table:
    """A table in the house's style."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, no_wrap=True)
    return made


def show(shown: Table, if_empty: str) -> None:
    """Print a table as wide as it is: a cut id could not be copied. The terminal wraps what does not fit."""
    if not shown.row_count:
        console.print(if_empty)
        return
    Console(width=max(console.width, WIDEST), highlight=False).print(shown)


def when(seconds: float | None) -> str:
    """A local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "–"


def show_models(client: openai.OpenAI) -> None:
    """All callable names."""
    shown = table("id", "kind", "base", "context", "made")
    for model in client.models.list():
        extra: dict[str, Any] = model.model_extra or {}
        context = str(extra.get("max_model_len") or "–")
        kind = "checkpoint" if extra.get("is_checkpoint") else str(extra.get("kind", "–"))
        parent = extra.get("root") if kind == "alias" else extra.get("parent")
        shown.add_row(escape(model.id), kind, escape(str(parent or "–")), context, when(model.created))
    show(shown, "No models yet: `tunesmith base add starter starter` makes one.")


def create_key(client: openai.OpenAI, name: str, scopes: list[str]) -> None:
    """The secret goes to stdout alone, so that it can be piped; the rest to stderr."""
    body: dict[str, Any] = {"name": name}
    if scopes:
        body["scopes"] = scopes
    made = post(client, "/keys", body)
    errors.print(f"Key {made['id']} with {', '.join(made['scopes'])}. It is shown this once:")
    print(made["value"])


def list_keys(client: openai.OpenAI) -> None:
    """Valid keys."""
    shown = table("id", "name", "scopes", "key", "made", "last used")
    for key in listed(client, "/keys"):
        scopes = ", ".join(key["scopes"])
        times = when(key["created_at"]), when(key["last_used_at"])
        shown.add_row(key["id"], escape(key["name"]), scopes, escape(key["redacted_value"]), *times)
    show(shown, "No keys.")


def revoke_key(client: openai.OpenAI, key_id: str) -> None:
    """From now on the key is refused."""
    client.delete(f"/keys/{quote(key_id, safe='')}", cast_to=dict[str, Any])
    console.print(f"Revoked {escape(key_id)}.")


def add_base(client: openai.OpenAI, name: str, source: str, revision: str | None) -> int:
    """Register and wait; returns the exit code. Leaving early does not stop the import."""
    body: dict[str, Any] = {"id": name, "source": source}
    if revision is not None:
        body["revision"] = revision
    base = post(client, "/bases", body)
    try:
        with console.status(f"Preparing {escape(name)} …") as status:
            while base["status"] == "preparing":
                time.sleep(POLL_S)
                base = get(client, f"/bases/{quote(name)}")
                status.update(escape(f"Preparing {name}: {base.get('status_details') or '…'}"))
    except KeyboardInterrupt:
        console.print("\nThe service goes on preparing it; see `tunesmith base list`.")
        return 130
    if base["status"] != "ready":
        errors.print(f"[red]Error:[/] {escape(str(base.get('status_details') or base['status']))}", soft_wrap=True)
        return 1
    console.print(f"[green]{escape(name)}[/] is ready: {base['num_parameters']:,} parameters.")
    return 0


def list_bases(client: openai.OpenAI) -> None:
    """All bases."""
    shown = table("id", "status", "parameters", "context", "source")
    for base in listed(client, "/bases"):
        num = f"{base['num_parameters']:,}" if base["num_parameters"] else "–"
        source = base["source"] + (f"@{base['revision']}" if base["revision"] else "")
        status = base["status"] + (f": {base['status_details']}" if base["status_details"] else "")
        shown.add_row(escape(base["id"]), escape(status), num, str(base["max_context"] or "–"), escape(source))
    show(shown, "No bases yet: `tunesmith base add starter starter` makes one.")


def set_alias(client: openai.OpenAI, name: str, model: str) -> None:
    """Move the name."""
    path = f"/aliases/{quote(name)}"
    alias = client.put(path, body={"model": model}, cast_to=dict[str, Any])
    console.print(f"{escape(name)} → {escape(alias['model'])} (revision {alias['revision']})")


def list_aliases(client: openai.OpenAI) -> None:
    """All aliases."""
    shown = table("name", "model", "revision", "moved")
    for alias in get(client, "/aliases")["data"]:
        shown.add_row(escape(alias["id"]), escape(alias["model"]), str(alias["revision"]), when(alias["created_at"]))
    show(shown, "No aliases.")


def delete_alias(client: openai.OpenAI, name: str) -> None:
    """The name stops answering."""
    client.delete(f"/aliases/{quote(name)}", cast_to=dict[str, Any])
    console.print(f"Deleted {escape(name)}.")
