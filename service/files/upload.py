"""Uploads: a multipart body goes to storage as it arrives, with bounded memory and off the event loop.

The bytes are written under `incoming/`, moved to `files/` once they are complete, and count only when the caller has
written the row. What a killed process leaves behind is removed by `service.files.cleanup`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import IO, Any

import anyio
from anyio import to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import InvalidRequest, ServiceError, TooLarge
from service.files import filenames
from service.store.database import new_id
from training.storage import Storage

PURPOSES = ("fine-tune", "user_data", "evals", "batch")
INCOMING = "incoming"
FILES = "files"
BLOCK_BYTES = 1 << 20  # what is gathered before a worker thread parses, hashes and writes it
DRAIN_BYTES = 64 << 20  # how much of a refused body is still read: a client that is cut off may miss the answer
MAX_FIELD_BYTES = 1024
MAX_PARTS = 16
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 2_592_000
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


@dataclass(frozen=True)
class Upload:
    """A complete upload whose bytes lie at `storage_key`; without a row it does not count."""

    file_id: str
    storage_key: str
    filename: str
    purpose: str
    expires_after_s: int | None
    size_bytes: int
    sha256: str


async def receive(content_type: str | None, body: AsyncIterator[bytes], storage: Storage, max_bytes: int) -> Upload:
    """Store the `file` part of a multipart body. On any failure nothing of it stays in storage."""
    form = _Form(storage, _boundary(content_type), max_bytes)
    try:
        async for block in _blocks(body):
            await to_thread.run_sync(form.feed, block)
        return await to_thread.run_sync(form.finish)
    except ServiceError:
        await _drain(body)
        raise
    finally:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(form.discard)


async def _blocks(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The body in blocks of about BLOCK_BYTES, whatever the network cuts it into."""
    parts: list[bytes] = []
    size = 0
    async for chunk in body:
        parts.append(chunk)
        size += len(chunk)
        if size >= BLOCK_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join(parts)


async def _drain(body: AsyncIterator[bytes]) -> None:
    left = DRAIN_BYTES
    async for chunk in body:
        left -= len(chunk)
        if left < 0:
            return


def _boundary(content_type: str | None) -> bytes:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest(
            "The content type must be multipart/form-data with a boundary; the form holds 'file' and 'purpose'.",
            code="invalid_content_type",
        )
    return options[b"boundary"]


class _Form:
    """Parses the body in worker threads, one call at a time, and owns the unfinished object in storage."""

    def __init__(self, storage: Storage, boundary: bytes, max_bytes: int) -> None:
        self._storage = storage
        self._max_bytes = max_bytes
        self._file_id = new_id("file-")
        self._key = f"{INCOMING}/{self._file_id}"
        self._lock = threading.Lock()  # a cancelled request discards while its last block may still be written
        self._sink: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._size = self._total = self._num_parts = 0
        self._filename: str | None = None
        self._fields: dict[str, bytearray] = {}
        self._part = ""  # name of the current part
        self._header_name, self._header_value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._complete = False
        callbacks: Any = {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }
        self._parser = self._parse(lambda: MultipartParser(boundary, callbacks))

    @staticmethod
    def _parse(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except FormParserError as error:
            raise InvalidRequest(f"The body is not valid multipart/form-data: {error}", code="invalid_body") from None

    def feed(self, block: bytes) -> None:
        """Parse one block and write what it holds of the file."""
        with self._lock:
            self._total += len(block)
            if self._total > self._max_bytes + BLOCK_BYTES:  # the form around the file is small, or it is no form
                raise self._too_large()
            self._parse(lambda: self._parser.write(block))

    def finish(self) -> Upload:
        """Check the form, complete the object and move it into place."""
        with self._lock:
            if not self._complete:
                raise InvalidRequest("The body ended before the closing multipart boundary.", code="invalid_body")
            if self._filename is None:
                raise _missing("file")
            if self._size == 0:
                raise InvalidRequest("The file is empty.", param="file", code="invalid_file")
            purpose = self._purpose()
            expires_after_s = self._expiry()
            self._commit()
            return Upload(
                file_id=self._file_id,
                storage_key=self._key,
                filename=self._filename,
                purpose=purpose,
                expires_after_s=expires_after_s,
                size_bytes=self._size,
                sha256=self._digest.hexdigest(),
            )

    def discard(self) -> None:
        """Remove the unfinished object; nothing happens after `finish`."""
        with self._lock:
            if self._sink is not None:
                sink, self._sink = self._sink, None
                try:
                    sink.close()
                finally:
                    self._storage.delete(self._key)

    def _commit(self) -> None:
        assert self._sink is not None
        self._sink.flush()
        if self._storage.is_local:
            os.fsync(self._sink.fileno())  # a committed row must not outlive its bytes in a power cut
        self._sink.close()
        target = f"{FILES}/{self._file_id}"
        self._storage.fs.makedirs(self._storage.path(FILES), exist_ok=True)
        self._storage.fs.mv(self._storage.path(self._key), self._storage.path(target))
        self._key, self._sink = target, None

    def _purpose(self) -> str:
        purpose = self._field("purpose")
        if purpose is None:
            raise _missing("purpose")
        if purpose not in PURPOSES:
            raise InvalidRequest(
                f"'{purpose[:64]}' is not a purpose that is accepted here; use one of: {', '.join(PURPOSES)}.",
                param="purpose",
            )
        return purpose

    def _expiry(self) -> int | None:
        anchor, seconds = self._field("expires_after[anchor]"), self._field("expires_after[seconds]")
        if anchor is None and seconds is None:
            return None
        if anchor is None or seconds is None:
            raise _missing(f"expires_after[{'anchor' if anchor is None else 'seconds'}]")
        if anchor != "created_at":
            raise InvalidRequest("expires_after[anchor] must be 'created_at'.", param="expires_after[anchor]")
        plain = seconds.isascii() and seconds.isdecimal() and len(seconds) < 10
        if not plain or not MIN_EXPIRY_S <= int(seconds) <= MAX_EXPIRY_S:
            raise InvalidRequest(
                f"expires_after[seconds] must be an integer from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}.",
                param="expires_after[seconds]",
            )
        return int(seconds)

    def _field(self, name: str) -> str | None:
        value = self._fields.get(name)
        return None if value is None else value.decode("utf-8", "replace")

    def _too_large(self) -> TooLarge:
        return TooLarge(f"The file is larger than the limit of {self._max_bytes} bytes.", param="file")

    def _on_part_begin(self) -> None:
        self._headers = {}
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidRequest(f"The form has more than {MAX_PARTS} parts.", code="invalid_body")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name, self._header_value = b"", b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._part = options.get(b"name", b"").decode("utf-8", "replace")
        encoding = self._headers.get(b"content-transfer-encoding", b"binary").strip().lower()
        if encoding not in (b"binary", b"7bit", b"8bit"):
            raise InvalidRequest("Content-Transfer-Encoding is not supported in a form; send the bytes as they are.")
        if self._part not in ("file", *_FIELDS):
            raise InvalidRequest(
                f"Unknown form field '{self._part[:64]}'.", param=self._part[:64], code="unknown_parameter"
            )
        if self._part in self._fields or (self._part == "file" and self._filename is not None):
            raise InvalidRequest(f"The form field '{self._part}' is given twice.", param=self._part)
        if self._part == "file":
            self._filename = filenames.clean(options.get(b"filename", b""))
            self._sink = self._storage.open_write(self._key)
        else:
            self._fields[self._part] = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part != "file":
            field = self._fields[self._part]
            field += data[start:end]
            if len(field) > MAX_FIELD_BYTES:
                raise InvalidRequest(f"The form field '{self._part}' is too long.", param=self._part)
            return
        assert self._sink is not None
        self._size += end - start
        if self._size > self._max_bytes:
            raise self._too_large()
        piece = memoryview(data)[start:end]
        self._digest.update(piece)
        self._sink.write(piece)

    def _on_end(self) -> None:
        self._complete = True


def _missing(name: str) -> InvalidRequest:
    return InvalidRequest(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
