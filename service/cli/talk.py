"""`tunesmith chat`: one question, or a conversation that the model sees whole."""

from __future__ import annotations

from typing import Any

import openai
from rich.markup import escape

from service.cli.client import console, errors


def chat(
    client: openai.OpenAI,
    model: str,
    prompt: str | None,
    *,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
) -> None:
    """Ask once, or until the end of input."""
    options: dict[str, Any] = {"temperature": temperature, "max_completion_tokens": max_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system is not None else []
    if prompt is not None:
        _answer(client, model, [*messages, {"role": "user", "content": prompt}], options)
        return
    console.print(f"Talking to {escape(model)}. An empty line or Ctrl-D ends it, Ctrl-C stops an answer.")
    while True:
        try:
            line = console.input("[bold]you:[/] ")
        except (EOFError, KeyboardInterrupt):
            break
        if not line.strip():
            break
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": _answer(client, model, messages, options)})
        except openai.BadRequestError as error:  # for one the context is full: the conversation may go on shorter
            errors.print(f"[red]Error:[/] {escape(error.message)}", soft_wrap=True)
            messages.pop()


def _answer(client: openai.OpenAI, model: str, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Stream one answer to the terminal; what came before Ctrl-C counts as the answer."""
    parts: list[str] = []
    stream: Any = client.chat.completions.create(model=model, messages=messages, stream=True, **options)  # type: ignore[arg-type]
    try:
        with stream:
            for chunk in stream:
                text = chunk.choices[0].delta.content if chunk.choices else None
                if text:
                    parts.append(text)
                    console.out(text, end="", highlight=False)
    except KeyboardInterrupt:
        pass  # the block above has closed the stream, which frees the sequence at the server
    console.out("")
    return "".join(parts)
