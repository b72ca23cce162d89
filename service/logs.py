"""JSON logs, one object a line, with request and job ids; secrets are redacted whoever wrote them."""

from __future__ import annotations

import json
import logging
import re
import sys
from contextvars import ContextVar

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)

# Our keys, bearer headers, Hub tokens, credentials in URLs: all between "://" and the last "@" before a blank or quote.
_SECRETS = re.compile(r"""sk-[\w-]{8,}|hf_\w{8,}|(?<=[Bb]earer )\S+|(?<=://)[^\s"']+(?=@)""")


_known: set[str] = set()


def never_show(secret: str) -> None:
    """Replace this secret too from now on, in this process; for those that no pattern finds."""
    if secret:
        _known.add(secret)


def redact(text: str) -> str:
    """The text with every secret replaced."""
    for secret in list(_known):
        text = text.replace(secret, "[redacted]")
    return _SECRETS.sub("[redacted]", text)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON line; fields given by `extra={"fields": {...}}` are included."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "at": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, variable in (("request_id", request_id), ("job_id", job_id)):
            if value := variable.get():
                line[name] = value
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, ensure_ascii=False, default=str))


def configure_logging(level: str) -> None:
    """Send the platform's loggers to standard error as JSON; other libraries' loggers are left alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("service", "training"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
