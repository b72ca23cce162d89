"""As much of a Weights & Biases server as its client needs for a run; and what an offline run holds."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.jobs.world import PATIENCE_S

BLOCK_BYTES = 32 << 10
FILE_HEADER_BYTES = 7
RECORD_HEADER = struct.Struct("<IHB")  # checksum, length, type as in LevelDB's log: 1 whole, 2 first, 3 middle, 4 last


class WandbServer(ThreadingHTTPServer):
    """Keeps the history of one run. With `refuses` it answers like the real one to a wrong key."""

    daemon_threads = True

    def __init__(self, *, refuses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuses, self.was_asked = refuses, False
        self.upserts: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The data of one GraphQL operation's answer; None for those that a run can do without."""
        owner = {"id": "e", "name": "me"}
        if "RunResumeStatus" in query:
            return {"model": {"id": "p", "name": variables["project"], "entity": owner, "bucket": self._bucket()}}
        if "UpsertBucket" in query:
            self.upserts.append(variables)
            named = {"id": "b", "name": variables["name"], "displayName": "", "description": "", "sweepName": None}
            project = {"id": "p", "name": "faq", "entity": owner}
            bucket = {**named, "config": "{}", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.history}}
        return None

    def stream(self, sent: dict[str, Any]) -> None:
        """A piece of the run's files, at its offset."""
        lines = sent.get("files", {}).get("wandb-history.jsonl")
        if lines:
            self.history[lines["offset"] :] = [json.loads(line) for line in lines["content"]]
        if sent.get("complete"):
            self.exit_codes.append(sent["exitcode"])

    def _bucket(self) -> dict[str, Any] | None:
        """What a client that resumes the run must know; None before there is a run."""
        if not self.upserts:
            return None
        tails = {"historyTail": json.dumps([json.dumps(line) for line in self.history[-1:]]), "eventsTail": "[]"}
        counts = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"config": "{}", "summaryMetrics": "{}", "wandbConfig": '{"t": 1}', "displayName": ""}
        return {"id": "b", "name": self.upserts[0]["name"], "tags": [], **tails, **counts, **texts}


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            self.server.was_asked = True
            sent = json.loads(body)
            data = self.server.answer(sent["query"], sent.get("variables") or {})
            answer = {"data": data} if data else {"data": None, "errors": [{"message": "not here"}]}
        elif self.path.endswith("/file_stream"):
            self.server.stream(json.loads(body))
        encoded = json.dumps(answer).encode()
        self.send_response(401 if self.server.refuses else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def wandb_server(*, refuses: bool = False) -> Iterator[WandbServer]:
    """A server within the block."""
    with WandbServer(refuses=refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def offline_history(folder: Path) -> list[dict[str, Any]]:
    """The history rows of the one offline run below the folder, which is written to its end moments after `finish`."""
    deadline = time.monotonic() + PATIENCE_S
    while "exit" not in (records := _records(folder)):
        assert time.monotonic() < deadline, "the run was not written to its end"
    rows = [record.history.item for record in records["history"]]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in rows]


def _records(folder: Path) -> dict[str, list[Any]]:
    """By their kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.rglob("*.wandb")
    found = defaultdict(list)
    for data in _log_records(file.read_bytes()):
        record = Record.FromString(data)
        found[record.WhichOneof("record_type")].append(record)
    return found


def _log_records(data: bytes) -> Iterator[bytes]:
    at, parts = FILE_HEADER_BYTES, b""
    while at < len(data):
        if BLOCK_BYTES - at % BLOCK_BYTES < RECORD_HEADER.size:
            at += BLOCK_BYTES - at % BLOCK_BYTES
            continue
        _, length, kind = RECORD_HEADER.unpack_from(data, at)
        at += RECORD_HEADER.size
        parts += data[at : at + length]
        at += length
        if kind in (1, 4):
            yield parts
            parts = b""
