"""From the name in a request to the immutable model and the app that serves it.

The catalog's version is read from the database in every request, as its key is checked, so that a moved alias is seen
by every request that is accepted after the move returned; only what that version implies is cached. Owns no SQL and no
Serve call.
"""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy.orm import Session

from service.errors import NotFound, Unavailable
from service.serving.messages import Deployable, Folder, Target, Task
from service.store import aliases, bases, models
from service.store import catalog as versions
from service.store.database import Database
from service.store.tables import BaseModel, Model

MAX_CACHED_NAMES = 10_000
RETRY_AFTER_S = 2.0

__all__ = ["Catalog", "Target", "base_deployable", "model_not_found", "own_deployable"]


def model_not_found(name: str) -> NotFound:
    """OpenAI's answer for a name that means nothing here, or nothing to this key."""
    message = f"The model `{name}` does not exist or you do not have access to it."
    return NotFound(message, param="model", code="model_not_found")


def base_deployable(base: BaseModel) -> Deployable:
    """What the app of a ready base hosts."""
    assert base.storage_key is not None
    assert base.manifest_hash is not None
    folder = Folder(base.storage_key, base.manifest_hash)
    return Deployable(kind="base", id=base.id, base_id=base.id, folder=folder, task=task_of(base.capabilities))


def own_deployable(model: Model, base: BaseModel) -> Deployable | None:
    """What the app of a fine-tuned model hosts; None for an adapter that lives in its base's app.

    Adapters of classifiers and embedding models are merged into a copy of the base, in an app of their own."""
    assert base.storage_key is not None
    assert base.manifest_hash is not None
    task = task_of(model.capabilities)
    if model.kind != "full" and task == "generate":
        return None
    return Deployable(
        kind="full",
        id=model.id,
        base_id=model.base_id,
        folder=Folder(model.storage_key, model.manifest_hash),
        task=task,
        base_folder=None if model.kind == "full" else Folder(base.storage_key, base.manifest_hash),
    )


def task_of(capabilities: list[str]) -> Task:
    """What an app does for models with these capabilities."""
    tasks: tuple[Task, ...] = ("classify", "embed")
    return next((task for task in tasks if task in capabilities), "generate")


class Catalog:
    """Resolves names; one per process, used from many threads (entries are replaced whole, never changed)."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._cache: dict[tuple[str, str], tuple[int, Target]] = {}

    def known(self, project_id: str, name: str, version: int) -> Target | None:
        """The target, if it was resolved at this version of the catalog or later."""
        cached = self._cache.get((project_id, name))
        return cached[1] if cached is not None and cached[0] >= version else None

    def lookup(self, project_id: str, name: str) -> Target:
        """`resolve` in a transaction of its own; blocks for a moment, so call it in a thread."""
        with self._db.read() as tx:
            return self.resolve(tx, project_id, name)

    def resolve(self, tx: Session, project_id: str, name: str) -> Target:
        """The target of a base id, model id, checkpoint id or alias. NotFound if unknown, Unavailable while preparing.

        An immutable id wins over an alias of the same name: it must never come to mean other weights.
        """
        version = versions.version(tx)
        if (known := self.known(project_id, name, version)) is not None:
            return known
        target = _by_id(tx, project_id, name, name) or _by_alias(tx, project_id, name)
        if target is None:
            raise model_not_found(name)
        if len(self._cache) >= MAX_CACHED_NAMES:
            self._cache.clear()
        self._cache[project_id, name] = (version, target)
        return target


def _by_alias(tx: Session, project_id: str, name: str) -> Target | None:
    found = aliases.current(tx, project_id, name)
    if found is None or not found[1]:
        return None
    revision, targets = found
    live = [target for target in targets if target.role == "live"]
    assert len(live) == 1, f"alias {name} has {len(live)} live targets"
    target = _by_id(tx, project_id, live[0].model_id, name)
    if target is None:
        return None
    return replace(target, alias=name, alias_revision=revision.revision)


def _by_id(tx: Session, project_id: str, model_id: str, name: str) -> Target | None:
    """The target of an immutable id; `name` is what the request called it, for messages."""
    base = bases.find(tx, model_id)
    if base is not None:
        return _base_target(base, name)
    model = models.find(tx, project_id, model_id)
    return _model_target(tx, model, name) if model is not None else None


def _base_target(base: BaseModel, name: str) -> Target:
    _check_ready(base, name)
    assert base.max_context is not None
    return Target(
        model_id=base.id,
        base_id=base.id,
        kind="base",
        deployable=base_deployable(base),
        adapter=None,
        capabilities=tuple(base.capabilities),
        max_context=base.max_context,
    )


def _model_target(tx: Session, model: Model, name: str) -> Target:
    base = bases.find(tx, model.base_id)
    if base is None or base.content_hash not in (None, model.base_content_hash):
        raise Unavailable(f"The base `{model.base_id}` of the model `{name}` is no longer here.", param="model")
    _check_ready(base, name)
    assert base.max_context is not None
    own = own_deployable(model, base)
    return Target(
        model_id=model.id,
        base_id=model.base_id,
        kind="full" if model.kind == "full" else "adapter",
        deployable=own or base_deployable(base),
        adapter=Folder(model.storage_key, model.manifest_hash) if own is None else None,
        capabilities=tuple(model.capabilities),
        max_context=base.max_context,
    )


def _check_ready(base: BaseModel, name: str) -> None:
    if base.status == "preparing":
        message = f"The model `{name}` is still being prepared. Try again soon."
        raise Unavailable(message, param="model", code="model_not_ready", retry_after_s=RETRY_AFTER_S)
    if base.status != "ready":
        raise model_not_found(name)
