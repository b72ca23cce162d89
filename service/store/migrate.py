"""Bring the database to this version's schema. `up` alone does this; every other process only checks.

To add a migration: change `tables.py`, then `python -m service.store.migrate "what changed"`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from service.store.database import Database

_ADVISORY_LOCK = 7_213_045_112  # any constant that is ours, for PostgreSQL


class SchemaMismatch(Exception):
    """The database is not of this version; the message says what to do."""


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(db: Database, to: str = "head") -> None:
    """Run what is missing up to a revision, under a lock and in one transaction. A newer database is refused."""
    scripts = ScriptDirectory.from_config(_config())
    engine = db.engine.execution_options(begin_immediate=True)  # on SQLite this transaction is the lock
    with engine.begin() as connection:
        if not db.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        current = _current(connection)
        known = {script.revision for script in scripts.walk_revisions()}
        if current is not None and current not in known:
            raise SchemaMismatch(
                f"The database {db.url.render_as_string()} has schema {current}, which this version does not know: "
                "it was written by a newer Tunesmith. Install that version, or use another home."
            )
        command.upgrade(_config(connection), to)


def check(db: Database) -> None:
    """SchemaMismatch unless the database is exactly of this version."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    with db.engine.connect() as connection:
        current = _current(connection)
    if current != head:
        raise SchemaMismatch(f"The database has schema {current}, this version needs {head}; run `tunesmith up`.")


def write_revision(message: str) -> None:
    """Write a migration for the difference between the newest migration and `tables.py`."""
    with tempfile.TemporaryDirectory() as folder:
        db = Database(f"sqlite:///{folder}/empty.db")
        upgrade(db)
        with db.engine.begin() as connection:
            command.revision(_config(connection), message, autogenerate=True)
        db.close()


if __name__ == "__main__":
    write_revision(sys.argv[1])
