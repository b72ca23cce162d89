"""The connection of the commands: where the service is, which key to use, and errors in plain words.

Owns the process edge of the command line: what the openai client raises becomes one message and exit code 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
import typer
from rich.console import Console

from service.settings import Settings

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


@contextmanager
def connected(url: str, key: str) -> Iterator[openai.OpenAI]:
    """A client for the block. Its errors end the command with a message instead of a traceback."""
    secret = key or _admin_key()
    try:
        with openai.OpenAI(base_url=url, api_key=secret, max_retries=1) as client:
            yield client
    except openai.APITimeoutError:
        fail(f"Tunesmith at {url} did not answer in time.")
    except (openai.APIConnectionError, httpx2.ConnectError):
        fail(f"No Tunesmith answers at {url}; start one with `tunesmith up`, or name it with --url.")
    except openai.AuthenticationError as error:
        fail(f"{message_of(error)} Give a key with --key or TUNESMITH_API_KEY.")
    except openai.APIError as error:
        fail(message_of(error))
    except httpx2.HTTPError as error:
        fail(f"The connection to {url} broke: {error}")


def fail(message: str) -> None:
    """Say what is wrong and end with code 1."""
    errors.print(f"[red]Error:[/] {_plain(message)}", soft_wrap=True)
    raise typer.Exit(1)


def message_of(error: openai.APIError) -> str:
    """The server's own sentence; the edge's plain text where no Tunesmith stands behind it."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return body["message"]
    status = getattr(error, "status_code", None)
    return f"HTTP {status}: {str(error)[:300]}" if status is not None else str(error)


def get(client: openai.OpenAI, path: str) -> dict[str, Any]:
    """GET one of the routes that OpenAI's client has no method for."""
    return client.get(path, cast_to=dict[str, Any])


def post(client: openai.OpenAI, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST to such a route."""
    return client.post(path, body=body, cast_to=dict[str, Any])


def listed(client: openai.OpenAI, path: str) -> Iterator[dict[str, Any]]:
    """Every object of a list, page by page."""
    after = ""
    while True:
        page = get(client, f"{path}?limit=100{after}")
        yield from page["data"]
        if not page.get("has_more") or not page["data"]:
            return
        after = f"&after={page['data'][-1]['id']}"


def _admin_key() -> str:
    path = Settings().admin_key_file
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        fail(f"No API key: give one with --key or TUNESMITH_API_KEY. There is no admin key in {path.parent} either.")
    except PermissionError:
        fail(f"No API key: give one with --key or TUNESMITH_API_KEY. The admin key {path} is not yours to read.")
    raise AssertionError("unreachable")


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
