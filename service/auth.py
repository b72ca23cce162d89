"""Who calls and what they may do: API keys by hash, scopes. Owns no wire format; `api` asks here on every request."""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass
from typing import Final

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service.errors import Forbidden, Unauthorized
from service.store import catalog, keys
from service.store.database import Database

log = logging.getLogger(__name__)

ADMIN: Final = "admin"  # holds every other scope
MAX_KNOWN_KEYS: Final = 10_000
TOUCH_INTERVAL_S: Final = 60.0  # a gateway writes `last_used_at` at most this often per key: reading stays cheap

_BEARER = re.compile(r"(?i:bearer) +(\S+)\s*")
_HINT = "Send a valid API key as 'Authorization: Bearer <key>'; whoever runs this service finds the first one in the admin key file."  # noqa: E501


@dataclass(frozen=True, slots=True)
class Caller:
    """The key behind a request. Everything it reads or makes belongs to its project."""

    key_id: str
    project_id: str
    scopes: frozenset[str]
    catalog_version: int  # when the key was checked: what was resolved at this version or later holds

    def has(self, *scopes: str) -> bool:
        """Whether the key holds any of the scopes."""
        return ADMIN in self.scopes or not self.scopes.isdisjoint(scopes)

    def require(self, *scopes: str) -> None:
        """Forbidden unless the key holds any of the scopes."""
        if not self.has(*scopes):
            wanted = " or ".join(f"'{scope}'" for scope in scopes)
            raise Forbidden(f"This API key lacks the scope {wanted} that the request needs.")


class Authenticator:
    """Asks the database on every request: a revoked key fails at once, whichever gateway is asked."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._known: dict[str, Caller] = {}  # by the secret's hash, each as of its catalog version
        self._touched: dict[str, float] = {}  # key id -> when its use was last written, as far as this process knows
        self._lock = threading.Lock()

    def caller(self, authorization: str | None) -> Caller:
        """The caller of a request with this Authorization header; Unauthorized if it names no valid key."""
        secret = _secret(authorization)
        with self._db.read() as tx:
            version = catalog.version(tx)
            known = self._known.get(keys.hash_secret(secret))
            if known is None or known.catalog_version != version:
                known = self._look_up(tx, secret, version)
        if known is None:
            raise Unauthorized(f"Incorrect API key provided: {_redacted(secret)}. {_HINT}")
        self._note_use(known.key_id)
        return known

    def _look_up(self, tx: Session, secret: str, version: int) -> Caller | None:
        key = keys.find(tx, secret)
        if key is None:
            return None
        if len(self._known) >= MAX_KNOWN_KEYS:
            self._known.clear()
        with self._lock:
            self._touched.setdefault(key.id, key.last_used_at or 0.0)
        caller = self._known[key.key_hash] = Caller(key.id, key.project_id, frozenset(key.scopes), version)
        return caller

    def _note_use(self, key_id: str) -> None:
        moment = time.time()
        with self._lock:
            if moment - self._touched.get(key_id, 0.0) < TOUCH_INTERVAL_S:
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
