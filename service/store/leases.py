"""Who may act as a singleton. The epoch fences: whoever holds an older one can write nothing more."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.store.database import now
from service.store.tables import Lease


class LeaseLost(Exception):
    """Another holder took the lease; the caller must stop."""


def acquire(tx: Session, name: str, holder: str, ttl_s: float) -> int | None:
    """Take the lease if it is free, expired, or held under the same holder name; returns the new epoch."""
    lease = tx.scalar(select(Lease).where(Lease.name == name).with_for_update())
    if lease is None:
        lease = Lease(name=name, holder=holder, epoch=0, expires_at=0.0)
        tx.add(lease)
    elif lease.expires_at > now() and lease.holder != holder:
        return None
    lease.holder, lease.epoch, lease.expires_at = holder, lease.epoch + 1, now() + ttl_s
    tx.flush()
    return lease.epoch


def hold(tx: Session, name: str, epoch: int, ttl_s: float) -> None:
    """Prove in this transaction that the lease is still ours, and prolong it. First statement of every write."""
    kept = tx.execute(update(Lease).where(Lease.name == name, Lease.epoch == epoch).values(expires_at=now() + ttl_s))
    if kept.rowcount == 0:  # type: ignore[attr-defined]
        raise LeaseLost(f"lease {name!r} epoch {epoch} was taken over")


def release(tx: Session, name: str, epoch: int) -> None:
    """Give the lease back early; nothing happens if it was lost."""
    tx.execute(update(Lease).where(Lease.name == name, Lease.epoch == epoch).values(expires_at=0.0))


def is_alive(tx: Session, name: str) -> bool:
    """Whether somebody holds the lease now."""
    expires_at = tx.scalar(select(Lease.expires_at).where(Lease.name == name))
    return expires_at is not None and expires_at > now()
