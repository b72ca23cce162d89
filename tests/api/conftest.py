"""The real application on a free loopback port, in this process, without Ray: real SQLite, real files, echo engine."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from typing import Any

import httpx2
import pytest
import pytest_asyncio
import uvicorn
from openai import AsyncOpenAI, OpenAI

from service.app import build_app
from service.files.validation import run_validation
from service.metrics import Metrics
from service.platform import Platform
from service.serving.catalog import Catalog
from service.serving.engines import InProcessEngines
from service.settings import Settings
from service.store import bases, instance, keys
from service.store.database import Database
from service.store.instance import DEFAULT_PROJECT
from tests.database import migrated
from training.storage import Storage

BASE = "tiny"
SLASHED_BASE = "org/tiny.v2"
RECORD = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
MAX_BODY_BYTES = 256 << 10

NewClient = Callable[..., OpenAI]
_numbers = count(1)


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@pytest.fixture(scope="session")
def admin_key() -> str:
    return keys.new_secret()


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory, admin_key: str) -> Iterator[Platform]:
    settings = Settings(
        home=tmp_path_factory.mktemp("home"), engine="echo", max_body_bytes=MAX_BODY_BYTES, max_train_workers=4
    )
    db = migrated(settings.resolved_database_url)
    with db.write() as tx:
        instance_id = instance.get_or_create(tx)
        keys.put_admin(tx, admin_key)
    for base_id in (BASE, SLASHED_BASE):
        add_base_row(db, base_id)
    storage = Storage(settings.resolved_storage_url)
    metrics = Metrics()
    yield Platform(
        settings, instance_id, db, storage, Catalog(db), InProcessEngines(settings, storage, metrics), metrics
    )
    db.close()


def add_base_row(db: Database, base_id: str, **changes: Any) -> None:
    """A base that is ready as far as the API can tell; nothing here loads its weights."""
    with db.write() as tx:
        bases.add(tx, project_id=DEFAULT_PROJECT, created_by=None, id=base_id, source="starter", revision=None)
        fields: dict[str, Any] = {
            "storage_key": "bases/0123",
            "content_hash": "0123",
            "manifest_hash": "4567",
            "fingerprint": {"tokenizer": "89ab"},
            "capabilities": ["chat", "completions"],
            "architecture": "LlamaForCausalLM",
            "num_parameters": 1000,
            "max_context": 512,
        }
        bases.set_ready(tx, base_id, **(fields | changes))


@pytest.fixture(scope="session")
def service_url(platform: Platform) -> Iterator[str]:
    """Where the service listens, without /v1."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = _Server(uvicorn.Config(build_app(platform), log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    assert server.listening.wait(30), "the service did not start"
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    listener.close()


@pytest.fixture(scope="session")
def client(service_url: str, admin_key: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service_url}/v1", api_key=admin_key, max_retries=0) as made:
        yield made


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def async_client(service_url: str, admin_key: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{service_url}/v1", api_key=admin_key, max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def http(service_url: str, admin_key: str) -> Iterator[httpx2.Client]:
    """Plain HTTP with the admin key, for what the openai client has no method for or would not send."""
    with httpx2.Client(base_url=service_url, headers={"authorization": f"Bearer {admin_key}"}) as made:
        yield made


@pytest.fixture(scope="session")
def anonymous(service_url: str) -> Iterator[httpx2.Client]:
    """Plain HTTP without a key; also the connection pool of the clients below, which are many and short-lived."""
    with httpx2.Client(base_url=service_url) as made:
        yield made


@pytest.fixture(scope="session")
def new_client(service_url: str, http: httpx2.Client, anonymous: httpx2.Client) -> NewClient:
    """Makes an openai client with a fresh key: of a fresh project unless one is named, with the given scopes."""

    def make(*scopes: str, project_id: str | None = None) -> OpenAI:
        number = next(_numbers)
        body: dict[str, Any] = {"name": f"key {number}", "project_id": project_id or f"proj-test-{number}"}
        if scopes:
            body["scopes"] = scopes
        answer = http.post("/v1/keys", json=body).raise_for_status().json()
        return OpenAI(
            base_url=f"{service_url}/v1",
            api_key=answer["value"],
            project=answer["project_id"],  # the client sends it as a header; tests read it back
            max_retries=0,
            http_client=anonymous,
        )

    return make


@pytest.fixture
def project_client(new_client: NewClient) -> OpenAI:
    """A client whose project holds nothing yet."""
    return new_client()


def upload(client: OpenAI, platform: Platform, content: bytes = RECORD * 10, *, validate: bool = True) -> str:
    """The id of a training file, validated as the worker task would."""
    file_id = client.files.create(file=("train.jsonl", content), purpose="fine-tune").id
    if validate:
        run_validation(platform.db, platform.storage, file_id)
    return file_id


@pytest.fixture
def training_file(project_client: OpenAI, platform: Platform) -> str:
    """A valid training file of the fresh project."""
    return upload(project_client, platform)
