"""The version counter of everything that an API key or a model name can resolve to. Reading it is one indexed look-up,
so a gateway asks once per request, sees every change that was committed before, and may keep the rest in memory."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.store.tables import Counter

NAME = "catalog"


def version(tx: Session) -> int:
    """Grows with every change of keys, bases, models or aliases."""
    return tx.scalar(select(Counter.value).where(Counter.name == NAME)) or 0


def bump(tx: Session) -> None:
    """Part of every transaction that changes the catalog."""
    if tx.execute(update(Counter).where(Counter.name == NAME).values(value=Counter.value + 1)).rowcount == 0:  # type: ignore[attr-defined]
        tx.add(Counter(name=NAME, value=1))
        tx.flush()
