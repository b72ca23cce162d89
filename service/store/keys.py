"""API keys. Only sha256 hashes are stored: the secrets are 256 random bits, so a slow hash would protect nothing."""

from __future__ import annotations

import hashlib
import secrets

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from service.errors import InvalidRequest, NotFound
from service.store import catalog
from service.store.database import new_id, now
from service.store.instance import DEFAULT_PROJECT
from service.store.tables import Key

SCOPES = ("admin", "files", "jobs", "models", "inference")
ADMIN_KEY_NAME = "admin key file"


def hash_secret(secret: str) -> str:
    """What is stored instead of the secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_secret() -> str:
    """A fresh secret in the customary form."""
    return "sk-" + secrets.token_urlsafe(32)


def create(tx: Session, *, project_id: str, name: str, scopes: list[str], created_by: str | None) -> tuple[Key, str]:
    """A new key and its secret, which is not stored and cannot be shown again."""
    secret = new_secret()
    return _insert(tx, secret, project_id, name, scopes, created_by), secret


def put_admin(tx: Session, secret: str) -> Key:
    """Make the secret of the admin key file valid, and former admin key files' secrets invalid."""
    former = tx.scalars(
        select(Key).where(Key.name == ADMIN_KEY_NAME, Key.revoked_at.is_(None), Key.created_by.is_(None))
    )
    for key in former:
        if key.key_hash == hash_secret(secret):
            return key
        key.revoked_at = now()
        catalog.bump(tx)
    return _insert(tx, secret, DEFAULT_PROJECT, ADMIN_KEY_NAME, ["admin"], None)


def _insert(tx: Session, secret: str, project_id: str, name: str, scopes: list[str], created_by: str | None) -> Key:
    key = Key(
        id=new_id("key-"),
        created_at=now(),
        project_id=project_id,
        created_by=created_by,
        name=name,
        key_hash=hash_secret(secret),
        hint=secret[-4:],
        scopes=scopes,
    )
    tx.add(key)
    tx.flush()
    catalog.bump(tx)
    return key


def find(tx: Session, secret: str) -> Key | None:
    """The valid key with this secret."""
    return tx.scalar(select(Key).where(Key.key_hash == hash_secret(secret), Key.revoked_at.is_(None)))


def touch(tx: Session, key_id: str) -> None:
    """Record that the key was used."""
    key = tx.scalar(select(Key).where(Key.id == key_id))
    if key is not None:
        key.last_used_at = now()


def in_project(project_id: str) -> list[ColumnElement[bool]]:
    """Conditions of the key list of a project."""
    return [Key.project_id == project_id, Key.revoked_at.is_(None)]


def revoke(tx: Session, project_id: str, key_id: str) -> Key:
    """Make a key invalid for every request accepted later."""
    key = tx.scalar(select(Key).where(Key.id == key_id, *in_project(project_id)))
    if key is None:
        raise NotFound(f"No API key with id '{key_id}'.")
    if key.name == ADMIN_KEY_NAME and key.created_by is None:
        raise InvalidRequest("The admin key is renewed by deleting its file and restarting, not by revoking it.")
    key.revoked_at = now()
    catalog.bump(tx)
    return key
