"""Connections and transactions. SQLite in WAL mode by default, PostgreSQL by URL.

A write transaction on SQLite takes the write lock at once (BEGIN IMMEDIATE): a deferred one may fail halfway when
another writer came first, a lock wait never does.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

BUSY_TIMEOUT_S = 30


class Database:
    """One per process. `read()` and `write()` give a session; `write()` commits at the end or rolls all back."""

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            assert self.url.database, "SQLite in memory cannot be shared between processes"
            Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
            connect_args = {"timeout": BUSY_TIMEOUT_S, "check_same_thread": False}
            self.engine = create_engine(self.url, connect_args=connect_args, json_serializer=_to_json)
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            self.engine = create_engine(self.url, pool_pre_ping=True, json_serializer=_to_json)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading one consistent state."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session whose changes are committed together, or not at all if the block raises."""
        with Session(self.engine.execution_options(begin_immediate=True), expire_on_commit=False) as session:
            with session.begin():
                yield session

    def close(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()


def _to_json(value: Any) -> str:
    """With characters as they are: SQLite compares the names in a JSON path with those in the text byte by byte."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can hold
        return json.dumps(value)
    return text


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we emit BEGIN ourselves, see _begin_sqlite
    cursor = connection.cursor()
    _use_wal(cursor)
    cursor.execute("PRAGMA synchronous=FULL")  # a committed row survives a power cut, not only a killed process
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _use_wal(cursor: Any) -> None:
    """Waits while another connection does the same to a new file; for this one of its locks SQLite itself does not."""
    until = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Any) -> None:
    immediate = connection.get_execution_options().get("begin_immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def new_id(prefix: str) -> str:
    """A fresh id such as `file-…` (the prefix holds its own separator); 120 random bits, never parsed again."""
    return prefix + secrets.token_hex(15)


def now() -> float:
    """Unix seconds; the one clock of all rows."""
    return time.time()
