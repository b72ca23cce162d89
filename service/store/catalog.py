"""The version counter of everything that a model name can resolve to. Reading it is one indexed look-up, so a gateway
asks per request and sees every change that was committed before."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.store.tables import Counter

NAME = "catalog"


def version(tx: Session) -> int:
    """Grows with every change of bases, models or aliases."""
    return tx.scalar(select(Counter.value).where(Counter.name == NAME)) or 0


def bump(tx: Session) -> None:
    """Part of every transaction that changes the catalog."""
    if tx.execute(update(Counter).where(Counter.name == NAME).values(value=Counter.value + 1)).rowcount == 0:  # type: ignore[attr-defined]
        tx.add(Counter(name=NAME, value=1))
        tx.flush()
