"""What the rest of the platform relies on in the store."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from service.errors import InvalidRequest, NotFound
from service.jobs.states import JobState
from service.store import (
    aliases,
    catalog,
    events,
    files,
    instance,
    jobs,
    keys,
    leases,
    metrics,
    migrate,
    models,
    runs,
    tasks,
)
from service.store.database import Database, now
from service.store.instance import DEFAULT_PROJECT
from service.store.paging import Page, page
from service.store.tables import Event, Job, Outbox


def add_job(tx: Any, **fields: Any) -> Job:
    values: dict[str, Any] = {
        "project_id": DEFAULT_PROJECT,
        "created_by": None,
        "method": "supervised",
        "priority": 0,
        "base_id": "base",
        "training_file_id": "file-1",
        "request": {},
        "request_hash": "hash",
        "spec": {},
    }
    return jobs.create(tx, **(values | fields))


def add_file(tx: Any, file_id: str) -> None:
    files.create(
        tx,
        project_id=DEFAULT_PROJECT,
        created_by=None,
        id=file_id,
        filename="rows.jsonl",
        purpose="fine-tune",
        size_bytes=1,
        sha256="",
        storage_key=f"files/{file_id}",
    )


def add_model(tx: Any, model_id: str) -> None:
    models.create(
        tx,
        id=model_id,
        project_id=DEFAULT_PROJECT,
        kind="adapter",
        is_checkpoint=False,
        base_id="base",
        base_content_hash="",
        capabilities=[],
        storage_key="k",
        manifest_hash="",
        fingerprint={},
        spec={},
    )


def test_migrating_twice_changes_nothing_and_keeps_the_instance(db: Database) -> None:
    with db.write() as tx:
        first = instance.get_or_create(tx)
    migrate.upgrade(db)
    migrate.check(db)
    with db.write() as tx:
        assert instance.get_or_create(tx) == first


def test_a_database_of_the_first_schema_with_jobs_and_runs_is_upgraded(db_url: str) -> None:
    database = Database(db_url)
    migrate.upgrade(database, "0001")
    with database.engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO jobs (id, created_at, project_id, kind, method, priority, state, desired, state_version, "
                "base_id, training_file_id, request, request_hash, spec, result_file_ids) VALUES ('ftjob-old', 1, 'p', "
                "'fine_tuning', 'supervised', 0, 'queued', 'run', 0, 'base', 'file-1', '{}', 'hash', '{}', '[]')"
            )
        )
        connection.execute(
            text(
                "INSERT INTO runs (id, created_at, job_id, attempt, epoch, state, heartbeat_at) "
                "VALUES ('run-1', 1, 'ftjob-old', 1, 1, 'ended', 1)"
            )
        )
    migrate.upgrade(database)
    migrate.check(database)
    with database.write() as tx:
        old, new = jobs.by_id(tx, "ftjob-old"), add_job(tx)
        assert (old.sweep, old.trial, old.trial_number) == (None, None, None)
        assert new.seq > old.seq
        assert (runs.get(tx, "run-1").job_id, runs.get(tx, "run-1").num_workers) == (old.id, None)
    database.close()


def test_a_newer_database_is_refused(db: Database) -> None:
    with db.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(migrate.SchemaMismatch, match="newer Tunesmith"):
        migrate.upgrade(db)
    with pytest.raises(migrate.SchemaMismatch):
        migrate.check(db)


def test_two_migrations_at_once_both_succeed(db_url: str) -> None:
    failures: list[BaseException] = []

    def upgrade() -> None:
        database = Database(db_url)
        try:
            migrate.upgrade(database)
        except Exception as error:
            failures.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=upgrade) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_write_that_raises_leaves_nothing(db: Database) -> None:
    with pytest.raises(RuntimeError), db.write() as tx:
        add_job(tx)
        raise RuntimeError("halfway")
    with db.read() as tx:
        assert not jobs.in_state(tx, *JobState)


def test_paging_walks_every_row_once_even_at_equal_times(db: Database) -> None:
    with db.write() as tx:
        job = add_job(tx)
        for i in range(7):
            events.add(tx, job, f"event {i}", at=1.0)
    seen: list[str] = []
    after: str | None = None
    with db.read() as tx:
        while True:
            rows, has_more = page(tx, Event, Page(after=after, limit=3), *events.of_job(job.id))
            seen += [row.message for row in rows]
            if not has_more:
                break
            after = rows[-1].id
        with pytest.raises(NotFound):
            page(tx, Event, Page(after="ftevent-unknown"), *events.of_job(job.id))
    assert seen == [f"event {i}" for i in reversed(range(7))]


def test_a_move_is_announced_in_its_transaction_and_lost_moves_raise(db: Database) -> None:
    with db.write() as tx:
        job = add_job(tx)
        jobs.move(tx, job.id, JobState.QUEUED)
    with pytest.raises(jobs.StateConflict), db.write() as tx:
        jobs.move(tx, job.id, JobState.FAILED, expect={JobState.RUNNING})
    with db.read() as tx:
        announced = [row.type for row in tx.query(Outbox).order_by(Outbox.seq)]
    assert announced == ["fine_tuning.job.validating_files", "fine_tuning.job.queued"]


def test_wishes_without_a_run_are_fulfilled_at_once(db: Database) -> None:
    with db.write() as tx:
        job = add_job(tx)
        jobs.move(tx, job.id, JobState.QUEUED, plan={"total_steps": 1})
        assert jobs.request_pause(tx, DEFAULT_PROJECT, job.id).state == "paused"
        assert jobs.request_resume(tx, DEFAULT_PROJECT, job.id).state == "queued"
        assert jobs.request_cancel(tx, DEFAULT_PROJECT, job.id).state == "cancelled"
        for wish in (jobs.request_cancel, jobs.request_pause, jobs.request_resume):
            with pytest.raises(InvalidRequest):
                wish(tx, DEFAULT_PROJECT, job.id)


def test_of_a_wish_and_an_ending_that_cross_the_later_one_is_told(db: Database) -> None:
    if db.is_sqlite:
        pytest.skip("writers take turns")
    with db.write() as tx:
        first, second = add_job(tx), add_job(tx)
        for job in (first, second):
            jobs.move(tx, job.id, JobState.QUEUED)
            jobs.move(tx, job.id, JobState.RUNNING)
            jobs.request_pause(tx, DEFAULT_PROJECT, job.id)
    with pytest.raises(jobs.StateConflict), db.write() as ending:
        read = jobs.by_id(ending, first.id)
        with db.write() as wish:
            jobs.request_cancel(wish, DEFAULT_PROJECT, first.id)
        jobs.move(ending, read.id, JobState.PAUSED)
    with pytest.raises(jobs.StateConflict), db.write() as wish:
        read = jobs.by_id(wish, second.id)
        with db.write() as ending:
            jobs.move(ending, second.id, JobState.PAUSED)
        jobs.request_cancel(wish, DEFAULT_PROJECT, read.id)


def test_a_file_cannot_be_deleted_under_an_open_job(db: Database) -> None:
    with db.write() as tx:
        add_file(tx, "file-1")
        job = add_job(tx, training_file_id="file-1")
    with pytest.raises(InvalidRequest, match=job.id), db.write() as tx:
        files.delete(tx, DEFAULT_PROJECT, "file-1")
    with db.write() as tx:
        jobs.request_cancel(tx, DEFAULT_PROJECT, job.id)
        files.delete(tx, DEFAULT_PROJECT, "file-1")


def test_a_delete_of_a_file_and_a_create_with_it_wait_for_each_other(db: Database) -> None:
    if db.is_sqlite:
        pytest.skip("writers take turns")
    with db.write() as tx:
        add_file(tx, "file-1")
    for first, second in ((files.hold, files.delete), (files.delete, files.hold)):
        with pytest.raises(RuntimeError, match="undone"), db.write() as tx:
            first(tx, DEFAULT_PROJECT, "file-1")
            with pytest.raises(OperationalError, match="lock timeout"), db.write() as other:
                other.execute(text("SET LOCAL lock_timeout = '50ms'"))
                second(other, DEFAULT_PROJECT, "file-1")
            raise RuntimeError("undone")


def test_metadata_filters_find_only_matching_jobs(db: Database) -> None:
    with db.write() as tx:
        red = add_job(tx, user_metadata={"team": "red", "n": "1"})
        plain = add_job(tx, user_metadata=None)
        add_job(tx, user_metadata={"team": "blue"})
        rows, _ = page(tx, Job, Page(), *jobs.in_project(DEFAULT_PROJECT, {"team": "red"}))
        assert [row.id for row in rows] == [red.id]
        rows, _ = page(tx, Job, Page(), *jobs.in_project(DEFAULT_PROJECT), jobs.without_metadata())
        assert [row.id for row in rows] == [plain.id]


def test_metadata_is_found_by_names_in_any_script(db: Database) -> None:
    with db.write() as tx:
        job = add_job(tx, user_metadata={"größe": "groß 🦙", "a.b c": "1"})
        add_job(tx, user_metadata={"größe": "klein"})
        for name, value in {"größe": "groß 🦙", "a.b c": "1"}.items():
            rows, _ = page(tx, Job, Page(), *jobs.in_project(DEFAULT_PROJECT, {name: value}))
            assert [row.id for row in rows] == [job.id]


def test_half_a_surrogate_pair_in_a_report_is_stored_as_it_came(db: Database) -> None:
    with db.write() as tx:
        job = add_job(tx, error={"message": "line 1: 'ö\ud800'"})
    with db.read() as tx:
        assert jobs.by_id(tx, job.id).error == {"message": "line 1: 'ö\ud800'"}


def test_a_taken_over_lease_fences_its_former_holder(db: Database) -> None:
    with db.write() as tx:
        first = leases.acquire(tx, "orchestrator", "a", ttl_s=60)
        assert first is not None
        assert leases.acquire(tx, "orchestrator", "b", ttl_s=60) is None
        leases.release(tx, "orchestrator", first)
        second = leases.acquire(tx, "orchestrator", "b", ttl_s=60)
        assert second is not None and second > first
        leases.hold(tx, "orchestrator", second, ttl_s=60)
        with pytest.raises(leases.LeaseLost):
            leases.hold(tx, "orchestrator", first, ttl_s=60)


def test_the_highest_attempt_of_a_step_wins(db: Database) -> None:
    with db.write() as tx:
        job = add_job(tx)
        for step in (1, 2, 3, 4):
            metrics.add(tx, job.id, 1, "step", step, {"num_trained_tokens": 10, "loss": 1.0}, now())
        for step in (3, 4, 5):  # the second attempt resumed after step 2
            metrics.add(tx, job.id, 2, "step", step, {"num_trained_tokens": 10, "loss": 2.0}, now())
            metrics.add(tx, job.id, 2, "step", step, {"num_trained_tokens": 10, "loss": 9.0}, now())  # sent twice
        curve = {row.step: row.data["loss"] for row in metrics.merged(tx, job.id, "step")}
        assert curve == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0}
        assert metrics.trained_tokens(tx, job.id) == 50


def test_an_ended_run_can_write_nothing_more(db: Database) -> None:
    with db.write() as tx:
        job = add_job(tx)
        run = runs.start(tx, job.id, epoch=1, num_workers=2)
        runs.hold(tx, run.id, 1)
        with pytest.raises(runs.RunLost):
            runs.hold(tx, run.id, 2)
        assert runs.end(tx, run.id, "lost")
        assert not runs.end(tx, run.id, "succeeded")
        with pytest.raises(runs.RunLost):
            runs.hold(tx, run.id, 1)
        assert runs.start(tx, job.id, epoch=1, num_workers=1).attempt == 2
        assert runs.num_workers(tx, job.id) == {1: 2, 2: 1}


def test_an_alias_moves_by_revisions_and_guards_its_target(db: Database) -> None:
    with db.write() as tx:
        before = catalog.version(tx)
        add_model(tx, "ft:a")
        add_model(tx, "ft:b")
        for model_id in ("ft:a", "ft:b"):
            aliases.put(tx, project_id=DEFAULT_PROJECT, name="live", model_id=model_id, created_by=None)
        revision, targets = aliases.get(tx, DEFAULT_PROJECT, "live")
        assert (revision.revision, [target.model_id for target in targets]) == (2, ["ft:b"])
        with pytest.raises(InvalidRequest, match="live"):
            models.delete(tx, DEFAULT_PROJECT, "ft:b")
        models.delete(tx, DEFAULT_PROJECT, "ft:a")
        aliases.delete(tx, DEFAULT_PROJECT, "live", None)
        assert aliases.current(tx, DEFAULT_PROJECT, "live") is None
        assert catalog.version(tx) > before + 4


def test_keys_are_found_by_secret_until_revoked_and_never_stored(db: Database) -> None:
    with db.write() as tx:
        key, secret = keys.create(tx, project_id=DEFAULT_PROJECT, name="app", scopes=["inference"], created_by=None)
        assert secret not in str(vars(key))
        found = keys.find(tx, secret)
        assert found is not None and found.id == key.id
        keys.revoke(tx, DEFAULT_PROJECT, key.id)
        assert keys.find(tx, secret) is None
        keys.put_admin(tx, "sk-first")
        keys.put_admin(tx, "sk-second")
        assert keys.find(tx, "sk-first") is None
        assert keys.find(tx, "sk-second") is not None


def test_a_task_of_a_dead_worker_is_claimed_again(db: Database) -> None:
    with db.write() as tx:
        task = tasks.add(tx, "validate_file", {"file_id": "file-1"})
        assert [t.id for t in tasks.claim(tx, 10, lease_s=-1)] == [task.id]  # a lease that has run out already
        assert [t.attempt for t in tasks.claim(tx, 10, lease_s=60)] == [2]
        assert not tasks.claim(tx, 10, lease_s=60)
        assert tasks.retry(tx, task.id, "no luck", delay_s=0, max_attempts=3)
        tasks.claim(tx, 10, lease_s=60)
        assert not tasks.retry(tx, task.id, "no luck", delay_s=0, max_attempts=3)
        assert tasks.num_open(tx) == 0
