"""A replica renders, checks, swaps adapters in, and tells every error as a value."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from service.engine.native.engine import NativeEngine
from service.engine.protocol import Delta
from service.engine.vllm import VllmEngine
from service.errors import InvalidRequest, RateLimited, ServiceError
from service.metrics import Metrics
from service.serving.messages import Accepted, ChatPrompt, Folder, Refused, ServeRequest, TextPrompt, TokenPrompt
from service.serving.replica import ReplicaCore, build_engine
from service.store.instance import DEFAULT_PROJECT
from tests.serving.conftest import BASE, World
from tests.serving.world import MAX_CONTEXT, add_base, add_model
from training.records import ChatMessage
from training.render import Renderer


@pytest_asyncio.fixture
async def core(world: World) -> AsyncIterator[ReplicaCore]:
    made = ReplicaCore(world.settings, world.storage, world.catalog.lookup(DEFAULT_PROJECT, BASE).deployable, Metrics())
    await made.start()
    yield made
    await made.stop()


def request(world: World, name: str = BASE, **fields: Any) -> ServeRequest:
    prompt = fields.pop("prompt", TextPrompt("hello"))
    return ServeRequest("req", world.catalog.lookup(DEFAULT_PROJECT, name), prompt, **fields)


async def answer(core: ReplicaCore, asked: ServeRequest) -> tuple[int, str]:
    """Prompt tokens and the text of the only choice."""
    num_prompt_tokens, text = -1, ""
    async for reply in core.generate(asked):
        if isinstance(reply, Refused):
            raise reply.error
        if isinstance(reply, Accepted):
            num_prompt_tokens, reply = reply.num_prompt_tokens, reply.deltas
        text += "".join(delta.text for delta in reply)
    return num_prompt_tokens, text


async def test_text_tokens_and_chat_are_rendered(core: ReplicaCore, world: World) -> None:
    assert await answer(core, request(world)) == (5, "hello")
    assert await answer(core, request(world, prompt=TokenPrompt((1, 2)))) == (2, '"#')
    chat = ChatPrompt((ChatMessage(role="user", content="Hi"),))
    assert (await answer(core, request(world, prompt=chat)))[1].startswith("user\nHi")


async def test_each_adapter_answers_for_itself_on_the_same_replica(core: ReplicaCore, world: World) -> None:
    for number in range(3):
        add_model(world.db, world.storage, BASE, f"ft:tiny:o::{number}")
        assert await answer(core, request(world, f"ft:tiny:o::{number}")) == (5, f"[ft:tiny:o::{number}] hello")
    assert core.stats().num_adapter_loads == 3


async def test_a_prefetched_adapter_is_resident_before_its_first_request(core: ReplicaCore, world: World) -> None:
    add_model(world.db, world.storage, BASE, "ft:tiny:o::p")
    await core.prefetch(world.catalog.lookup(DEFAULT_PROJECT, "ft:tiny:o::p"))
    assert core.stats().resident_adapters == ("ft:tiny:o::p",)


async def test_an_adapter_with_a_template_of_its_own_is_prompted_with_it(core: ReplicaCore, world: World) -> None:
    template = "{% for message in messages %}{{ message.content }}!{% endfor %}"
    add_model(world.db, world.storage, BASE, "ft:tiny:o::t", template=template)
    chat = ChatPrompt((ChatMessage(role="user", content="Hi"),))
    assert (await answer(core, request(world, "ft:tiny:o::t", prompt=chat)))[1] == "[ft:tiny:o::t] Hi!"


@pytest.mark.parametrize("damage", ["content", "missing"])
async def test_a_damaged_adapter_is_refused_until_it_is_whole(core: ReplicaCore, world: World, damage: str) -> None:
    model_id = f"ft:tiny:o::{damage}"
    key = add_model(world.db, world.storage, BASE, model_id)
    whole = world.storage.read_bytes(f"{key}/chat_template.jinja")
    if damage == "content":
        world.storage.write_bytes(f"{key}/chat_template.jinja", whole + b" ")
    else:
        world.storage.delete(f"{key}/chat_template.jinja")
    with pytest.raises(ServiceError, match="cannot be served"):
        await answer(core, request(world, model_id))
    world.storage.write_bytes(f"{key}/chat_template.jinja", whole)
    assert (await answer(core, request(world, model_id)))[1] == f"[{model_id}] hello"


async def test_an_adapter_of_other_weights_is_refused(core: ReplicaCore, world: World) -> None:
    add_base(world.db, world.storage, "other")
    add_model(world.db, world.storage, "other", "ft:other:o::1")
    foreign = world.catalog.lookup(DEFAULT_PROJECT, "ft:other:o::1")
    with pytest.raises(ServiceError, match="cannot be served"):
        await answer(core, replace(request(world), target=foreign))


async def test_a_prompt_that_fills_the_context_is_refused_in_openais_words(core: ReplicaCore, world: World) -> None:
    with pytest.raises(InvalidRequest, match=f"maximum context length is {MAX_CONTEXT} tokens") as caught:
        await answer(core, request(world, prompt=TextPrompt("x" * MAX_CONTEXT)))
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(InvalidRequest, match="you requested 257 tokens") as caught:
        await answer(core, request(world, max_tokens=252))
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")


async def test_an_answer_that_nobody_watches_comes_in_few_messages_and_streams_share_theirs(world: World) -> None:
    """60 tokens in 2 ms each, which a stream alone gets in many messages."""
    settings = world.settings.model_copy(
        update={"echo_token_interval_ms": 2.0, "coalesce_ms": 0.0, "max_batch_size": 400, "max_waiting": 400}
    )
    core = ReplicaCore(settings, world.storage, world.catalog.lookup(DEFAULT_PROJECT, BASE).deployable, Metrics())
    await core.start()

    async def num_messages(*, is_streamed: bool) -> int:
        asked = request(world, prompt=TextPrompt("x" * 60), max_tokens=60, is_streamed=is_streamed)
        return len([reply async for reply in core.generate(asked)])

    alone = await num_messages(is_streamed=True)
    in_company = await asyncio.gather(*(num_messages(is_streamed=True) for _ in range(300)))
    unwatched = await num_messages(is_streamed=False)
    await core.stop()
    assert unwatched < sum(in_company) / len(in_company) + 1 < alone


async def test_prompts_that_the_model_cannot_take_are_the_clients_fault(core: ReplicaCore, world: World) -> None:
    for prompt in (TextPrompt(""), TokenPrompt((10**6,))):
        with pytest.raises(InvalidRequest):
            await answer(core, request(world, prompt=prompt))


async def test_more_choices_than_the_engine_ever_holds_are_the_clients_fault(core: ReplicaCore, world: World) -> None:
    with pytest.raises(InvalidRequest, match="n=4"):
        await answer(core, request(world, n=4))


async def test_a_mistake_of_ours_is_not_blamed_on_the_client(
    core: ReplicaCore, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    target = replace(request(world).target, model_id="ft:tiny:o::lost", adapter=Folder("../elsewhere", "0" * 64))
    with pytest.raises(ServiceError) as caught:  # storage refuses such a key by a ValueError
        await answer(core, replace(request(world), target=target))
    assert caught.value.status == 500
    assert "elsewhere" not in caught.value.message
    assert "bad storage key" in caplog.text


async def test_a_full_queue_is_told_with_a_time_to_come_back(core: ReplicaCore, world: World) -> None:
    async with aclosing(core.generate(request(world, n=2))) as running:
        assert isinstance(await anext(running), Accepted)
        with pytest.raises(RateLimited) as caught:  # two of three places are taken
            await answer(core, request(world, n=2))
        assert caught.value.retry_after_s
    assert (await answer(core, request(world, n=1)))[1] == "hello"


async def test_closing_a_stream_frees_its_sequences(core: ReplicaCore, world: World) -> None:
    async with aclosing(core.generate(request(world, n=2))) as replies:
        assert isinstance(await anext(replies), Accepted)
        assert core.stats().num_running == 2
    assert core.stats().num_running == 0


async def test_a_stopped_engine_makes_the_replica_unhealthy(core: ReplicaCore) -> None:
    core.check_health()
    await core.engine.stop()
    with pytest.raises(RuntimeError, match="engine"):
        core.check_health()


def test_vllm_serves_the_bases_that_are_named(world: World) -> None:
    target = request(world).target
    renderer = Renderer.load(world.storage.local_folder(target.deployable.folder.key))
    kinds = []
    for bases in ("", f"other,{BASE}"):
        settings = world.settings.model_copy(update={"engine": "native", "vllm_bases": bases})
        kinds.append(type(build_engine(settings, world.storage, target.deployable, renderer)))
    assert kinds == [NativeEngine, VllmEngine]


def test_what_travels_survives_pickling(world: World) -> None:
    asked = request(world, prompt=ChatPrompt((ChatMessage(role="user", content="Hi"),)))
    refused = Refused(RateLimited("full", retry_after_s=2.0))
    for value in (asked, Accepted(3, [Delta(0, "a", 1)])):
        assert pickle.loads(pickle.dumps(value)) == value
    error = pickle.loads(pickle.dumps(refused)).error
    assert (error.status, error.message, error.retry_after_s) == (429, "full", 2.0)
