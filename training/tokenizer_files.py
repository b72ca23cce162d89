"""The tokenizer files of a model folder, read as transformers reads them: special tokens, added tokens, templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from training.template import RenderError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none. RenderError if it is not JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RenderError(f"{path.name} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens, a base's own ones (image_token, …) included; each is text or an AddedToken as a dict."""
    tokens = {}
    for name in [*_NAMED, *(key for key in config if key.endswith("_token") and key not in _NAMED)]:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def add_missing_tokens(tokenizer: Tokenizer, config: dict[str, Any], special: dict[str, str]) -> None:
    """Tokens that tokenizer_config.json declares and tokenizer.json lacks, in transformers' order."""
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing: dict[str, AddedToken] = {}
    declared = config.get("added_tokens_decoder") or {}
    for _, token in sorted(declared.items(), key=lambda item: int(item[0])):
        if token["content"] not in present:
            flags = {key: value for key, value in token.items() if key not in ("content", "__type")}
            missing[token["content"]] = AddedToken(token["content"], **flags)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    names = [item.get("content") if isinstance(item, dict) else item for item in extra if not isinstance(extra, dict)]
    for content in [*special.values(), *names]:
        if isinstance(content, str) and content not in present:
            missing.setdefault(content, AddedToken(content, special=True, normalized=False))
    tokenizer.add_tokens(list(missing.values()))


def set_post_processor(tokenizer: Tokenizer, config: dict[str, Any], special: dict[str, str]) -> None:
    """add_bos_token and add_eos_token, where given, rule over tokenizer.json's post-processor, as in transformers."""
    bos = special.get("bos_token") if config.get("add_bos_token") else None
    eos = special.get("eos_token") if config.get("add_eos_token") else None
    used = [token for token in (bos, eos) if token]
    tokenizer.post_processor = TemplateProcessing(
        single=[part for part in (bos, "$A", eos) if part],
        pair=[part for part in (bos, "$A", eos, bos, "$B", eos) if part],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(used)],
    )


def templates(folder: Path, config: dict[str, Any]) -> tuple[str | None, str | None]:
    """The default template and the one for tools, if it has its own. A file rules over the configuration."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8"), None
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {item["name"]: item["template"] for item in value}
        return named.get("default"), named.get("tool_use") if "default" in named else None
    return (value, None) if isinstance(value, str) else (None, None)
