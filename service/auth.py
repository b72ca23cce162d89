"""Who calls and what they may do: API keys by hash, scopes. Owns no wire format; `api` asks here on every request."""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass
from typing import Final

from sqlalchemy.exc import OperationalError

from service.errors import Forbidden, Unauthorized
from service.store import keys
from service.store.database import Database

log = logging.getLogger(__name__)

ADMIN: Final = "admin"  # holds every other scope
TOUCH_INTERVAL_S: Final = 60.0  # `last_used_at` is written at most this often per key, so that reading stays cheap

_BEARER = re.compile(r"(?i:bearer) +(\S+)\s*")
_HINT = "Send a valid API key as 'Authorization: Bearer <key>'; whoever runs this service finds the first one in the admin key file."  # noqa: E501


@dataclass(frozen=True, slots=True)
class Caller:
    """The key behind a request. Everything it reads or makes belongs to its project."""

    key_id: str
    project_id: str
    scopes: frozenset[str]

    def has(self, *scopes: str) -> bool:
        """Whether the key holds any of the scopes."""
        return ADMIN in self.scopes or not self.scopes.isdisjoint(scopes)

    def require(self, *scopes: str) -> None:
        """Forbidden unless the key holds any of the scopes."""
        if not self.has(*scopes):
            wanted = " or ".join(f"'{scope}'" for scope in scopes)
            raise Forbidden(f"This API key lacks the scope {wanted} that the request needs.")


class Authenticator:
    """Looks keys up on every request: a revoked key fails at once, whichever gateway is asked."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._touched: dict[str, float] = {}  # key id -> when this process last wrote its use
        self._lock = threading.Lock()

    def caller(self, authorization: str | None) -> Caller:
        """The caller of a request with this Authorization header; Unauthorized if it names no valid key."""
        secret = _secret(authorization)
        with self._db.read() as tx:
            key = keys.find(tx, secret)
        if key is None:
            raise Unauthorized(f"Incorrect API key provided: {_redacted(secret)}. {_HINT}")
        self._note_use(key.id, key.last_used_at)
        return Caller(key.id, key.project_id, frozenset(key.scopes))

    def _note_use(self, key_id: str, last_used_at: float | None) -> None:
        moment = time.time()
        with self._lock:
            last = max(self._touched.get(key_id, 0.0), last_used_at or 0.0)
            if moment - last < TOUCH_INTERVAL_S:
                return
            self._touched[key_id] = moment
        try:
            with self._db.write() as tx:
                keys.touch(tx, key_id)
        except OperationalError:  # the database is busy: a late `last_used_at` is no reason to refuse a request
            log.info("could not note the use of key %s", key_id)


def _secret(authorization: str | None) -> str:
    if not authorization:
        raise Unauthorized(f"You did not provide an API key. {_HINT}")
    match = _BEARER.fullmatch(authorization)
    if match is None:
        raise Unauthorized(f"The Authorization header is malformed. {_HINT}")
    return match[1]


def _redacted(secret: str) -> str:
    """Enough to recognise one's own key by, never enough to use it."""
    return f"{secret[:3]}…{secret[-4:]}" if len(secret) >= 16 else "…"
