"""Names resolve to immutable models; a moved alias is seen by the very next request."""

from __future__ import annotations

import pytest

from service.errors import NotFound, Unavailable
from service.store import aliases, bases, models
from service.store.instance import DEFAULT_PROJECT
from tests.serving.conftest import BASE, World
from tests.serving.world import MAX_CONTEXT, add_base, add_model


def test_a_base_is_callable_by_its_id(world: World) -> None:
    target = world.catalog.lookup(DEFAULT_PROJECT, BASE)
    assert (target.model_id, target.kind, target.adapter, target.max_context) == (BASE, "base", None, MAX_CONTEXT)


def test_adapters_share_the_app_of_their_base_and_full_models_have_their_own(world: World) -> None:
    add_model(world.db, world.storage, BASE, "ft:tiny:o::a")
    add_model(world.db, world.storage, BASE, "ft:tiny:o::f", kind="full")
    base, adapter, full = (world.catalog.lookup(DEFAULT_PROJECT, id) for id in (BASE, "ft:tiny:o::a", "ft:tiny:o::f"))
    assert adapter.deployable == base.deployable
    assert adapter.adapter is not None
    assert full.deployable.key != base.deployable.key
    assert full.adapter is None


def test_an_unknown_name_is_told_in_openais_words(world: World) -> None:
    with pytest.raises(NotFound) as caught:
        world.catalog.lookup(DEFAULT_PROJECT, "gpt-9")
    assert caught.value.message == "The model `gpt-9` does not exist or you do not have access to it."
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_models_of_other_projects_do_not_exist(world: World) -> None:
    add_model(world.db, world.storage, BASE, "ft:tiny:o::x", project_id="proj-other")
    with pytest.raises(NotFound):
        world.catalog.lookup(DEFAULT_PROJECT, "ft:tiny:o::x")
    assert world.catalog.lookup("proj-other", "ft:tiny:o::x").model_id == "ft:tiny:o::x"


def test_a_base_that_is_being_prepared_asks_to_come_back(world: World) -> None:
    with world.db.write() as tx:
        bases.add(tx, project_id=DEFAULT_PROJECT, created_by=None, id="soon", source="starter", revision=None)
    with pytest.raises(Unavailable) as caught:
        world.catalog.lookup(DEFAULT_PROJECT, "soon")
    assert caught.value.retry_after_s


def test_an_alias_is_seen_moved_renamed_and_gone_at_once(world: World) -> None:
    add_model(world.db, world.storage, BASE, "ft:tiny:o::1")
    for number, model_id in enumerate((BASE, "ft:tiny:o::1", BASE), start=1):
        with world.db.write() as tx:
            aliases.put(tx, project_id=DEFAULT_PROJECT, name="prod", model_id=model_id, created_by=None)
        target = world.catalog.lookup(DEFAULT_PROJECT, "prod")
        assert (target.model_id, target.alias, target.alias_revision) == (model_id, "prod", number)
    with world.db.write() as tx:
        aliases.delete(tx, DEFAULT_PROJECT, "prod", None)
    with pytest.raises(NotFound):
        world.catalog.lookup(DEFAULT_PROJECT, "prod")


def test_a_deleted_model_is_gone_at_once(world: World) -> None:
    add_model(world.db, world.storage, BASE, "ft:tiny:o::2")
    world.catalog.lookup(DEFAULT_PROJECT, "ft:tiny:o::2")
    with world.db.write() as tx:
        models.delete(tx, DEFAULT_PROJECT, "ft:tiny:o::2")
    with pytest.raises(NotFound):
        world.catalog.lookup(DEFAULT_PROJECT, "ft:tiny:o::2")


def test_a_model_whose_base_is_other_weights_now_is_not_served(world: World) -> None:
    add_base(world.db, world.storage, "other")
    add_model(world.db, world.storage, "other", "ft:other:o::1")
    with world.db.write() as tx:
        bases.set_ready(tx, "other", content_hash="f" * 64)
    with pytest.raises(Unavailable):
        world.catalog.lookup(DEFAULT_PROJECT, "ft:other:o::1")
