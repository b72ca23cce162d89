"""Every table. Rows leave the store as these classes, detached and read-only by convention; only `store` writes SQL.

`seq` is the monotonic insertion order that paging uses; `id` is what the API shows, never reused and never parsed.
Times are Unix seconds (`…_at`), sizes bytes (`…_bytes`). Every object carries its project and its creator.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, MetaData, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite gives a monotonic rowid only to INTEGER PRIMARY KEY AUTOINCREMENT; elsewhere a 64-bit identity is wanted.
Seq = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    """Metadata of all tables, with fixed constraint names so that migrations can speak of them."""

    type_annotation_map = {  # noqa: RUF012 - None is SQL NULL, not the JSON value null
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
    }
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def _seq() -> Mapped[int]:
    return mapped_column(Seq, primary_key=True, autoincrement=True)


def _id() -> Mapped[str]:
    return mapped_column(String(128), unique=True)


class Listable:
    """What every listable table has."""

    __table_args__: Any = {"sqlite_autoincrement": True}  # noqa: RUF012
    seq: Mapped[int] = _seq()
    id: Mapped[str] = _id()
    created_at: Mapped[float]


class Owned(Listable):
    """A listable object with its project and the key that made it."""

    project_id: Mapped[str] = mapped_column(String(64), index=True)
    created_by: Mapped[str | None] = mapped_column(String(64))


class Instance(Base):
    """One row: the identity of this Tunesmith, part of every Ray actor, app and route name."""

    __tablename__ = "instance"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    created_at: Mapped[float]


class Counter(Base):
    """Named version counters: `catalog` moves with every change of keys, models, bases or aliases."""

    __tablename__ = "counters"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[int]


class Lease(Base):
    """Who may act as a singleton; `epoch` grows with each holder and fences the former one's writes."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(128))
    epoch: Mapped[int]
    expires_at: Mapped[float]


class Project(Listable, Base):
    """A tenant."""

    __tablename__ = "projects"
    name: Mapped[str] = mapped_column(String(128))


class Key(Owned, Base):
    """An API key; only its hash is kept."""

    __tablename__ = "keys"
    name: Mapped[str] = mapped_column(String(128))
    key_hash: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(16))  # the last four characters
    scopes: Mapped[list[Any]]
    last_used_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class File(Owned, Base):
    """An uploaded or produced file. `report` is the validation report once `status` left `uploaded`."""

    __tablename__ = "files"
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(32), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    storage_key: Mapped[str] = mapped_column(String(512))
    status: Mapped[str] = mapped_column(String(16))  # uploaded | processed | error
    status_details: Mapped[str | None]
    report: Mapped[dict[str, Any] | None]
    expires_at: Mapped[float | None]
    deleted_at: Mapped[float | None]


class BaseModel(Owned, Base):
    """An allowed base model, copied into storage. Its id is the name that requests use."""

    __tablename__ = "bases"
    source: Mapped[str] = mapped_column(String(1024))  # "starter", a folder, or a Hub id
    revision: Mapped[str | None] = mapped_column(String(128))
    status: Mapped[str] = mapped_column(String(16))  # preparing | ready | error
    status_details: Mapped[str | None]
    # Filled when ready:
    storage_key: Mapped[str | None] = mapped_column(String(512))
    content_hash: Mapped[str | None] = mapped_column(String(64))
    manifest_hash: Mapped[str | None] = mapped_column(String(64))
    fingerprint: Mapped[dict[str, Any] | None]
    capabilities: Mapped[list[Any]]  # of "chat", "completions", "classify", "embed"
    architecture: Mapped[str | None] = mapped_column(String(128))
    num_parameters: Mapped[int | None] = mapped_column(BigInteger)
    max_context: Mapped[int | None]  # tokens
    deleted_at: Mapped[float | None]


class Job(Owned, Base):
    """A user's wish to fine-tune. `state` is where it is, `desired` where its owner wants it."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_state_priority_seq", "state", "priority", "seq"),
        Index("ix_jobs_parent_job_id_trial_number", "parent_job_id", "trial_number", unique=True),
        {"sqlite_autoincrement": True},
    )
    kind: Mapped[str] = mapped_column(String(32))  # fine_tuning | sweep
    method: Mapped[str] = mapped_column(String(32))
    parent_job_id: Mapped[str | None] = mapped_column(String(128))  # of a trial: its sweep
    trial_number: Mapped[int | None]  # of a trial: 1, 2, … within its sweep
    trial: Mapped[dict[str, Any] | None]  # of a trial: its combination and how it does, see service.jobs.sweeps.Trial
    sweep: Mapped[dict[str, Any] | None]  # of a sweep: what to search, see service.jobs.sweeps.Sweep
    priority: Mapped[int]
    state: Mapped[str] = mapped_column(String(32))
    desired: Mapped[str] = mapped_column(String(32))  # run | pause | cancel
    state_version: Mapped[int]
    base_id: Mapped[str] = mapped_column(String(128))
    parent_model_id: Mapped[str | None] = mapped_column(String(256))
    training_file_id: Mapped[str] = mapped_column(String(128))
    validation_file_id: Mapped[str | None] = mapped_column(String(128))
    suffix: Mapped[str | None] = mapped_column(String(64))
    request: Mapped[dict[str, Any]]  # the create body as it was sent
    request_hash: Mapped[str] = mapped_column(
        String(64), index=True
    )  # of key and body: finds the job of a retried create
    spec: Mapped[dict[str, Any]]  # TrainSpec; resolved once planned
    plan: Mapped[dict[str, Any] | None]  # training.plan's numbers, once planned
    user_metadata: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]  # {code, message, param}, and {suggested_request} if there is one
    result_file_ids: Mapped[list[Any]]
    fine_tuned_model: Mapped[str | None] = mapped_column(String(256))
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    estimated_finish_at: Mapped[float | None]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    stop_requested_at: Mapped[float | None]  # when pause or cancel of a live run was asked


class Run(Listable, Base):
    """One attempt at a job, by one driver. Writes of a driver whose epoch is not the row's are refused."""

    __tablename__ = "runs"
    __table_args__ = (UniqueConstraint("job_id", "attempt"), {"sqlite_autoincrement": True})
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    attempt: Mapped[int]
    epoch: Mapped[int]  # the orchestrator's lease epoch that made it
    num_workers: Mapped[int | None]  # train workers that it has; a sweep's 0; None in runs of an earlier version
    state: Mapped[str] = mapped_column(String(16), index=True)  # active | ended
    outcome: Mapped[str | None] = mapped_column(String(32))  # succeeded | paused | requeued | cancelled | failed | lost
    heartbeat_at: Mapped[float]
    first_step_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    resumed_from: Mapped[int | None]  # step
    failure: Mapped[dict[str, Any] | None]


class Metric(Base):
    """Numbers of one step. Attempts may repeat a step; the highest attempt wins in every reader."""

    __tablename__ = "metrics"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(8), primary_key=True)  # step | eval
    attempt: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[dict[str, Any]]
    at: Mapped[float]


class Event(Owned, Base):
    """A line of a job's event list. `dedup_key` makes a repeated delivery by a driver a no-op."""

    __tablename__ = "events"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(16))  # message | metrics
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]
    dedup_key: Mapped[str] = mapped_column(String(192), unique=True)


class Checkpoint(Owned, Base):
    """A resumable state of a job; `model_id` is a callable model."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "attempt", "step"), {"sqlite_autoincrement": True})
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    attempt: Mapped[int]
    step: Mapped[int]
    storage_key: Mapped[str] = mapped_column(String(512))
    manifest_hash: Mapped[str] = mapped_column(String(64))
    model_id: Mapped[str] = mapped_column(String(256))
    metrics: Mapped[dict[str, Any]]
    deleted_at: Mapped[float | None]


class Model(Owned, Base):
    """A servable fine-tuned model; immutable once written."""

    __tablename__ = "models"
    id: Mapped[str] = mapped_column(String(256), unique=True)
    kind: Mapped[str] = mapped_column(String(16))  # adapter | full
    is_checkpoint: Mapped[bool]
    base_id: Mapped[str] = mapped_column(String(128), index=True)
    base_content_hash: Mapped[str] = mapped_column(String(64))
    parent_id: Mapped[str | None] = mapped_column(String(256))
    job_id: Mapped[str | None] = mapped_column(String(128), index=True)
    step: Mapped[int | None]
    capabilities: Mapped[list[Any]]
    storage_key: Mapped[str] = mapped_column(String(512))
    manifest_hash: Mapped[str] = mapped_column(String(64))
    fingerprint: Mapped[dict[str, Any]]
    spec: Mapped[dict[str, Any]]
    deleted_at: Mapped[float | None]


class AliasRevision(Owned, Base):
    """One state of an alias; the highest revision is the current one, and one without targets means deleted."""

    __tablename__ = "alias_revisions"
    __table_args__ = (UniqueConstraint("project_id", "name", "revision"), {"sqlite_autoincrement": True})
    name: Mapped[str] = mapped_column(String(128))
    revision: Mapped[int]


class AliasTarget(Base):
    """A model that a revision points to."""

    __tablename__ = "alias_targets"
    revision_id: Mapped[str] = mapped_column(ForeignKey("alias_revisions.id"), primary_key=True)
    model_id: Mapped[str] = mapped_column(String(256), primary_key=True)
    weight: Mapped[float]
    role: Mapped[str] = mapped_column(String(16))  # live


class Task(Listable, Base):
    """Work for a Ray task, claimed under a lease and retried when the lease runs out."""

    __tablename__ = "tasks"
    kind: Mapped[str] = mapped_column(String(32))  # validate_file | plan_job | delete_folder | …
    payload: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16), index=True)  # queued | leased | done | failed
    attempt: Mapped[int]
    not_before: Mapped[float]
    lease_until: Mapped[float | None]
    error: Mapped[str | None]
    answer: Mapped[dict[str, Any] | None]  # of a task that somebody waits for, once done


class Outbox(Base):
    """A transition that happened, written in its transaction; readers (SSE, webhooks) follow `seq`."""

    __tablename__ = "outbox"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012
    seq: Mapped[int] = _seq()
    project_id: Mapped[str] = mapped_column(String(64))
    type: Mapped[str] = mapped_column(String(64))  # e.g. fine_tuning.job.succeeded
    object_id: Mapped[str] = mapped_column(String(256))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class Usage(Base):
    """Tokens per key, model and UTC day."""

    __tablename__ = "usage"
    key_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    model_id: Mapped[str] = mapped_column(String(256), primary_key=True)
    day: Mapped[str] = mapped_column(String(10), primary_key=True)  # YYYY-MM-DD
    project_id: Mapped[str] = mapped_column(String(64))
    num_requests: Mapped[int]
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
