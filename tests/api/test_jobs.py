"""Fine-tuning jobs over HTTP, as far as they go without a run: create, retry, list, wishes, events, checkpoints."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from service.api.create_job import Attempt, create_job
from service.api.schemas import CreateJob
from service.auth import Caller
from service.jobs.states import JobState
from service.platform import Platform
from service.store import catalog, checkpoints, jobs, keys
from service.store.database import now
from tests.api.conftest import BASE, SLASHED_BASE, NewClient, add_base_row, upload
from training.spec import ClassificationSpec, DpoSpec, EmbeddingSpec, TrainSpec

LABELLED = b'{"text": "Where is my card?", "label": "card"}\n{"text": "Is this you?", "label": "other"}\n' * 5
RETRY = {"x-stainless-retry-count": "1"}


def extra(thing: Any, name: str) -> Any:
    return (thing.model_extra or {})[name]


def test_a_job_answers_with_every_field_of_openais(project_client: OpenAI, training_file: str) -> None:
    job = project_client.fine_tuning.jobs.create(model=SLASHED_BASE, training_file=training_file, suffix="My Bot 1.0")
    assert job.id.startswith("ftjob-")
    assert (job.object, job.status, job.model) == ("fine_tuning.job", "validating_files", SLASHED_BASE)
    assert (job.training_file, job.validation_file, job.result_files) == (training_file, None, [])
    assert (job.fine_tuned_model, job.finished_at, job.trained_tokens, job.error) == (None, None, None, None)
    assert isinstance(job.seed, int)
    assert isinstance(job.created_at, int)
    assert job.organization_id == "local"
    assert job.hyperparameters.model_dump() == {
        "n_epochs": "auto",
        "batch_size": "auto",
        "learning_rate_multiplier": "auto",
    }
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.n_epochs == "auto"
    assert extra(job, "suffix") == "my-bot-1.0"
    assert extra(job, "adapter")["type"] == "lora"
    assert (extra(job, "plan"), extra(job, "desired"), extra(job, "num_workers")) == (None, "run", 1)
    assert project_client.fine_tuning.jobs.retrieve(job.id) == job


def test_given_settings_are_echoed_and_become_the_spec(
    project_client: OpenAI, platform: Platform, training_file: str
) -> None:
    held_out = upload(project_client, platform)
    job = project_client.fine_tuning.jobs.create(
        model=BASE,
        training_file=training_file,
        validation_file=held_out,
        seed=7,
        metadata={"team": "a"},
        hyperparameters={"n_epochs": 9},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra_body={
            "adapter": {"rank": 4, "targets": ["q_proj"], "rslora": True, "dora": True},
            "num_workers": 2,
            "parallel": "fsdp",
            "precision": "fp32",
            "priority": 3,
            "sample_prompts": ["Who are you?"],
        },
    )
    assert extra(job, "sample_prompts") == ["Who are you?"]
    assert (job.seed, job.metadata, job.validation_file) == (7, {"team": "a"}, held_out)
    assert job.hyperparameters.n_epochs == 2  # that of `method` is the effective one
    variant = {"rslora": True, "dora": True, "dropout": 0.0, "targets": ["q_proj"]}
    assert extra(job, "adapter") == {"type": "lora", "rank": 4, "alpha": "auto", **variant}
    with platform.db.read() as tx:
        row = jobs.by_id(tx, job.id)
    assert (row.priority, row.spec["num_workers"], row.spec["precision"], row.spec["seed"]) == (3, 2, "fp32", 7)
    assert row.spec["parallel"] == extra(job, "parallel") == "fsdp"
    assert row.spec["hyperparameters"]["n_epochs"] == 2
    assert row.spec["validation_key"] == f"files/{held_out}"


def test_a_range_of_workers_is_echoed_and_becomes_the_spec(
    project_client: OpenAI, platform: Platform, training_file: str
) -> None:
    body = {"num_workers": {"min": 2, "max": 4}}
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file, extra_body=body)
    assert extra(job, "num_workers") == body["num_workers"]
    with platform.db.read() as tx:
        spec = jobs.by_id(tx, job.id).spec
    assert (spec["min_workers"], spec["num_workers"]) == (2, 4)


def test_our_hyperparameters_ride_in_the_method(project_client: OpenAI, training_file: str) -> None:
    ours = {"learning_rate": 0.001, "lr_scheduler": "cosine", "warmup_ratio": 0, "max_length": 64}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": ours}}
    job = project_client.fine_tuning.jobs.create(
        model=BASE, training_file=training_file, method=method, extra_body={"adapter": {"type": "none"}}
    )
    assert job.method is not None
    assert job.method.supervised is not None
    echoed = job.method.supervised.hyperparameters
    assert echoed is not None
    assert ours.items() <= echoed.model_dump().items()
    assert extra(job, "adapter") == {"type": "none"}


PAIR = (
    b'{"input": {"messages": [{"role": "user", "content": "hi"}]}, '
    b'"preferred_output": [{"role": "assistant", "content": "hello"}], '
    b'"non_preferred_output": [{"role": "assistant", "content": "go away"}]}\n'
)


def test_a_dpo_job_echoes_its_settings_and_becomes_the_spec(project_client: OpenAI, platform: Platform) -> None:
    pairs = upload(project_client, platform, PAIR * 10)
    assert project_client.files.retrieve(pairs).status == "processed"
    chosen: Any = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5, "beta": 0.2}
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": chosen}}
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=pairs, method=method)
    assert job.method is not None
    assert job.method.type == "dpo"
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    echoed = job.method.dpo.hyperparameters.model_dump()
    assert chosen.items() <= echoed.items()
    assert (echoed["loss_type"], echoed["gamma"]) == ("sigmoid", "auto")
    assert job.hyperparameters.model_dump() == chosen
    assert job.method.supervised is None
    with platform.db.read() as tx:
        spec = TrainSpec.model_validate(jobs.by_id(tx, job.id).spec)
    assert (spec.method, spec.dpo, spec.hyperparameters.n_epochs) == ("dpo", DpoSpec(beta=0.2), 2)


def test_a_dpo_job_needs_no_settings(project_client: OpenAI, platform: Platform) -> None:
    pairs = upload(project_client, platform, PAIR * 10)
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=pairs, method={"type": "dpo"})
    assert job.hyperparameters.model_dump()["beta"] == "auto"


def test_a_classification_job_echoes_its_settings_and_becomes_the_spec(
    project_client: OpenAI, platform: Platform
) -> None:
    rows = upload(project_client, platform, LABELLED)
    report: Any = project_client.files.retrieve(rows).model_dump()["report"]
    assert (report["kind"], report["num_records"]) == ("classification", 10)
    chosen: Any = {"n_epochs": 2, "learning_rate_multiplier": 0.5, "class_weights": "balanced"}
    body: Any = {"type": "classification", "classification": {"hyperparameters": chosen}}
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=rows, method=body)
    echoed: Any = job.model_dump()
    assert echoed["method"]["type"] == "classification"
    hyperparameters = echoed["method"]["classification"]["hyperparameters"]
    assert chosen.items() <= hyperparameters.items()
    assert hyperparameters["label_smoothing"] == "auto"
    assert "labels" not in hyperparameters, "what is echoed can be sent again"
    assert echoed["adapter"] == {"type": "none"}, "a small model trains all its weights unless told otherwise"
    with platform.db.read() as tx:
        spec = TrainSpec.model_validate(jobs.by_id(tx, job.id).spec)
    assert (spec.method, spec.classification) == ("classification", ClassificationSpec(class_weights="balanced"))
    lora: Any = {"adapter": {"type": "lora"}}
    asked = project_client.fine_tuning.jobs.create(model=BASE, training_file=rows, method=body, extra_body=lora)
    assert asked.model_dump()["adapter"]["type"] == "lora"


def test_a_base_that_cannot_learn_by_the_method_is_refused(project_client: OpenAI, platform: Platform) -> None:
    add_base_row(platform.db, "encoder", architecture="BertModel", capabilities=["embed"])
    file = upload(project_client, platform)
    with pytest.raises(openai.BadRequestError) as caught:
        project_client.fine_tuning.jobs.create(model="encoder", training_file=file)
    assert (caught.value.code, caught.value.param) == ("invalid_base_model", "model")
    rows = upload(project_client, platform, LABELLED)
    method: Any = {"type": "classification"}
    assert project_client.fine_tuning.jobs.create(model="encoder", training_file=rows, method=method).model == "encoder"
    with pytest.raises(openai.BadRequestError, match="is no encoder") as caught:
        embedding: Any = {"type": "embedding"}
        project_client.fine_tuning.jobs.create(model=BASE, training_file=rows, method=embedding)
    assert (caught.value.code, caught.value.param) == ("invalid_base_model", "model")


def test_an_embedding_job_echoes_its_settings_and_becomes_the_spec(project_client: OpenAI, platform: Platform) -> None:
    add_base_row(platform.db, "embedder", architecture="BertModel", capabilities=["embed"])
    rows = upload(project_client, platform, b'{"anchor": "a", "positive": "b"}\n' * 10)
    report: Any = project_client.files.retrieve(rows).model_dump()["report"]
    assert (report["kind"], report["num_records"]) == ("pair", 10)
    body: Any = {"type": "embedding", "embedding": {"hyperparameters": {"n_epochs": 2, "temperature": 0.1}}}
    job = project_client.fine_tuning.jobs.create(model="embedder", training_file=rows, method=body)
    echoed: Any = job.model_dump()
    assert {"n_epochs": 2, "temperature": 0.1}.items() <= echoed["method"]["embedding"]["hyperparameters"].items()
    with platform.db.read() as tx:
        spec = TrainSpec.model_validate(jobs.by_id(tx, job.id).spec)
    assert (spec.method, spec.embedding, spec.adapter) == ("embedding", EmbeddingSpec(temperature=0.1), None)
    body["embedding"]["hyperparameters"]["temperature"] = 0
    with pytest.raises(openai.BadRequestError) as caught:
        project_client.fine_tuning.jobs.create(model="embedder", training_file=rows, method=body)
    assert caught.value.param == "method.embedding.hyperparameters.temperature"


@pytest.mark.parametrize(
    ("chosen", "param"),
    [
        ({"class_weights": "heavy"}, "method.classification.hyperparameters.class_weights"),
        ({"label_smoothing": 1}, "method.classification.hyperparameters.label_smoothing"),
        ({"labels": ["a", "b"]}, "method.classification.hyperparameters.labels"),
        ({"beta": 0.1}, "method.classification.hyperparameters.beta"),
    ],
)
def test_faulty_settings_of_a_classification_are_named(
    project_client: OpenAI, training_file: str, chosen: Any, param: str
) -> None:
    method: Any = {"type": "classification", "classification": {"hyperparameters": chosen}}
    with pytest.raises(openai.BadRequestError) as caught:
        project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file, method=method)
    assert caught.value.param == param


def test_the_deprecated_hyperparameters_count_where_the_method_has_none(
    project_client: OpenAI, training_file: str
) -> None:
    job = project_client.fine_tuning.jobs.create(
        model=BASE, training_file=training_file, hyperparameters={"n_epochs": 3}, method={"type": "supervised"}
    )
    assert job.hyperparameters.n_epochs == 3


def test_the_deprecated_hyperparameters_count_where_the_method_does_not_name_them(
    project_client: OpenAI, training_file: str
) -> None:
    def create(**in_method: Any) -> Any:
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": in_method}}
        made = project_client.fine_tuning.jobs.create(
            model=BASE, training_file=training_file, hyperparameters={"n_epochs": 3}, method=method
        )
        return made.hyperparameters

    assert create().n_epochs == 3
    assert (create(batch_size=2).n_epochs, create(batch_size=2).batch_size) == (3, 2)
    assert create(n_epochs="auto").n_epochs == "auto"


def test_an_alias_of_a_base_starts_from_that_base(project_client: OpenAI, training_file: str) -> None:
    project_client.put("/aliases/start", cast_to=object, body={"model": BASE})
    assert project_client.fine_tuning.jobs.create(model="start", training_file=training_file).model == BASE


def test_an_unknown_model_is_a_404(project_client: OpenAI, training_file: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        project_client.fine_tuning.jobs.create(model="gpt-none", training_file=training_file)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_an_unusable_file_is_refused_with_its_faults(project_client: OpenAI, platform: Platform) -> None:
    broken = upload(project_client, platform, b'{"messages": []}\n{"prompt": 3}\n')
    results = project_client.files.create(file=("x.jsonl", b"{}\n"), purpose="batch").id
    for file_id, words in ((broken, "line 1"), (results, "purpose"), ("file-none", "no file")):
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            project_client.fine_tuning.jobs.create(model=BASE, training_file=file_id)
        assert (caught.value.code, caught.value.param) == ("invalid_training_file", "training_file")
    good = upload(project_client, platform)
    with pytest.raises(openai.BadRequestError, match="line 1") as caught:
        project_client.fine_tuning.jobs.create(model=BASE, training_file=good, validation_file=broken)
    assert (caught.value.code, caught.value.param) == ("invalid_validation_file", "validation_file")


def test_a_file_that_is_still_being_validated_will_do(project_client: OpenAI, platform: Platform) -> None:
    pending = upload(project_client, platform, validate=False)
    assert project_client.fine_tuning.jobs.create(model=BASE, training_file=pending).status == "validating_files"


def test_a_retried_create_makes_no_second_job(project_client: OpenAI, training_file: str) -> None:
    def create(**options: Any) -> str:
        return project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file, **options).id

    first = create()
    assert create(extra_headers=RETRY) == first
    second = create()
    assert second != first, "a deliberate second create is a second job"
    assert create(extra_headers=RETRY) == second
    assert create(seed=1, extra_headers=RETRY) not in (first, second), "another body is another job"


def test_an_idempotency_key_names_one_job(project_client: OpenAI, training_file: str) -> None:
    def create(key: str) -> str:
        made = project_client.fine_tuning.jobs.create(
            model=BASE, training_file=training_file, extra_headers={"Idempotency-Key": key}
        )
        return made.id

    assert create("a") == create("a")
    assert create("a") != create("b")


def test_a_retry_of_another_key_is_another_job(new_client: NewClient, platform: Platform) -> None:
    one = new_client()
    other = new_client(project_id=one.project)
    file_id = upload(one, platform)
    first = one.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    assert other.fine_tuning.jobs.create(model=BASE, training_file=file_id, extra_headers=RETRY).id != first.id


def test_a_create_and_its_retry_at_the_same_time_make_one_job(
    project_client: OpenAI, platform: Platform, training_file: str
) -> None:
    """Both wait for the write lock, as when a client times out on a busy service and tries again."""
    both_sent = threading.Barrier(3)

    def create(headers: dict[str, str]) -> str:
        both_sent.wait(10)
        return project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file, extra_headers=headers).id

    with ThreadPoolExecutor(2) as pool:
        with platform.db.write() as tx:
            keys.find(tx, "")  # any statement takes the lock
            made = [pool.submit(create, headers) for headers in ({}, RETRY)]
            both_sent.wait(10)
            with pytest.raises(TimeoutError):
                made[0].result(timeout=0.3)
        assert made[0].result(30) == made[1].result(30)
    assert len(project_client.fine_tuning.jobs.list().data) == 1


def test_jobs_are_paged_newest_first(project_client: OpenAI, training_file: str) -> None:
    made = [project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file).id for _ in range(7)]
    first = project_client.fine_tuning.jobs.list(limit=3)
    assert first.has_more
    assert [job.id for job in first] == made[::-1]  # three pages
    third = project_client.fine_tuning.jobs.list(limit=3, after=made[1])
    assert ([job.id for job in third.data], third.has_more) == ([made[0]], False)


def test_jobs_are_filtered_by_metadata(project_client: OpenAI, training_file: str) -> None:
    def create(metadata: dict[str, str] | None) -> str:
        return project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file, metadata=metadata).id

    def found(**query: Any) -> list[str]:
        return [job.id for job in project_client.fine_tuning.jobs.list(**query)]

    one, two = create({"team": "a", "the run": "1"}), create({"team": "a", "the run": "2"})
    without = [create({"team": "b"}), create(None), create({})]
    assert project_client.fine_tuning.jobs.retrieve(without[2]).metadata is None
    named = create({"größe": "groß"})
    assert found(metadata={"team": "a"}) == [two, one]
    assert found(metadata={"team": "a", "the run": "1"}) == [one]
    assert found(metadata={"team": "c"}) == []
    assert found(metadata={"größe": "groß"}) == [named]
    assert found(extra_query={"metadata": "null"}) == [without[2], without[1]]
    for name in ("metadata[", "metadata[]", 'metadata[a"b]', "metadata[a\\b]"):
        with pytest.raises(openai.BadRequestError):
            found(extra_query={name: "x"})


def test_a_queued_job_is_cancelled_at_once(project_client: OpenAI, training_file: str) -> None:
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    cancelled = project_client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at
    for call in (project_client.fine_tuning.jobs.cancel, project_client.fine_tuning.jobs.pause):
        with pytest.raises(openai.BadRequestError):
            call(job.id)
    with pytest.raises(openai.BadRequestError):
        project_client.fine_tuning.jobs.resume(job.id)


def test_a_queued_job_is_paused_and_resumed(project_client: OpenAI, platform: Platform, training_file: str) -> None:
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    with platform.db.write() as tx:
        jobs.move(tx, job.id, JobState.QUEUED, plan={})
    assert project_client.fine_tuning.jobs.pause(job.id).status == "paused"  # type: ignore[comparison-overlap]
    assert project_client.fine_tuning.jobs.pause(job.id).status == "paused"  # type: ignore[comparison-overlap]
    assert project_client.fine_tuning.jobs.resume(job.id).status == "queued"
    with pytest.raises(openai.BadRequestError):
        project_client.fine_tuning.jobs.resume(job.id)


def test_a_running_job_keeps_its_state_until_its_run_obeys(
    project_client: OpenAI, platform: Platform, training_file: str
) -> None:
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    with platform.db.write() as tx:
        jobs.move(tx, job.id, JobState.QUEUED)
        jobs.move(tx, job.id, JobState.RUNNING)
    assert project_client.fine_tuning.jobs.pause(job.id).status == "pausing"  # type: ignore[comparison-overlap]
    cancelling = project_client.fine_tuning.jobs.cancel(job.id)
    assert (cancelling.status, extra(cancelling, "desired")) == ("pausing", "cancel")


@pytest.mark.parametrize("wish", ["cancel", "pause", "resume"])
def test_a_wish_has_no_body(project_client: OpenAI, training_file: str, wish: str) -> None:
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    with pytest.raises(openai.BadRequestError, match="takes no body"):
        getattr(project_client.fine_tuning.jobs, wish)(job.id, extra_body={"after_step": 5})
    assert project_client.fine_tuning.jobs.retrieve(job.id).status == "validating_files"


@pytest.mark.parametrize("call", ["retrieve", "cancel", "pause", "resume", "list_events"])
def test_an_unknown_job_is_a_404(client: OpenAI, call: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        getattr(client.fine_tuning.jobs, call)("ftjob-none")
    assert caught.value.code == "fine_tune_not_found"
    assert caught.value.request_id


def test_a_retry_that_overtakes_its_original_makes_one_job(platform: Platform, client: OpenAI, admin_key: str) -> None:
    body = CreateJob(model=BASE, training_file=upload(client, platform), seed=11)

    def create(retry_count: int, received_at: float) -> str:
        with platform.db.write() as tx:
            key = keys.find(tx, admin_key)
            assert key is not None
            who = Caller(key.id, key.project_id, frozenset(key.scopes), catalog.version(tx))
            return create_job(tx, platform, who, body, Attempt(retry_count, "", received_at)).id

    before = now()
    by_retry = create(1, now())
    assert create(0, before) == by_retry, "the original, which waited meanwhile"
    assert create(0, now()) != by_retry, "a later create is a second job"


def test_checkpoints_are_callable_models_newest_first(
    project_client: OpenAI, platform: Platform, training_file: str
) -> None:
    job = project_client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    with platform.db.write() as tx:
        row = jobs.by_id(tx, job.id)
        for step in (5, 10, 15):
            checkpoints.add(
                tx,
                row,
                attempt=1,
                step=step,
                storage_key=f"runs/{job.id}/checkpoints/step-{step:06}",
                manifest_hash="0123",
                model_id=f"ft:tiny:local::abc:ckpt-step-{step}",
                metrics={"train_loss": 0.5},
            )
    first = project_client.fine_tuning.jobs.checkpoints.list(job.id, limit=2)
    assert (first.has_more, extra(first, "first_id"), extra(first, "last_id")) == (
        True,
        first.data[0].id,
        first.data[1].id,
    )
    every = list(first)
    assert [checkpoint.step_number for checkpoint in every] == [15, 10, 5]
    assert every[0].fine_tuned_model_checkpoint == "ft:tiny:local::abc:ckpt-step-15"
    assert every[0].metrics.train_loss == 0.5
    assert every[0].metrics.step == 15


async def test_the_async_client_creates_pages_and_cancels(
    async_client: AsyncOpenAI, client: OpenAI, platform: Platform
) -> None:
    file_id = upload(client, platform)
    made = [await async_client.fine_tuning.jobs.create(model=BASE, training_file=file_id) for _ in range(3)]
    listed = [job.id async for job in async_client.fine_tuning.jobs.list(limit=1, extra_query={"metadata": "null"})]
    assert listed[:3] == [job.id for job in made[::-1]]
    assert (await async_client.fine_tuning.jobs.cancel(made[0].id)).status == "cancelled"
