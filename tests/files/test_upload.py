"""Uploads: what arrives is stored to the byte, however the network cuts it; what fails leaves nothing behind."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator

import pytest

from service.errors import InvalidRequest, ServiceError, TooLarge
from service.files import filenames
from service.files.upload import BLOCK_BYTES, FILES, INCOMING, receive
from training.storage import Storage

CONTENT_TYPE = 'multipart/form-data; boundary="b0"'
Part = tuple[str, bytes, str | None]  # name, value, filename


def body_of(*parts: Part, end: bytes = b"--b0--\r\n") -> bytes:
    pieces = []
    for name, value, filename in parts:
        named = "" if filename is None else f'; filename="{filename}"'
        head = f'--b0\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
        pieces.append(head.encode() + value + b"\r\n")
    return b"".join(pieces) + end


PURPOSE: Part = ("purpose", b"fine-tune", None)


async def cut(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


def left_in(storage: Storage) -> list[str]:
    return storage.list_names(INCOMING) + storage.list_names(FILES)


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 24])
@pytest.mark.parametrize("file_first", [True, False])
async def test_bytes_arrive_unchanged_however_they_are_cut(storage: Storage, size: int, file_first: bool) -> None:
    # Text that looks like the end of the form, at many distances from the cuts.
    data = b"\r\n--b\r\n--b0x\r\r\n\n--b0".join([b"x" * n for n in range(60)])
    file: Part = ("file", data, "a.jsonl")
    parts = [file, PURPOSE] if file_first else [PURPOSE, file]
    upload = await receive(CONTENT_TYPE, cut(body_of(*parts), size), storage, 1 << 20)
    assert storage.read_bytes(upload.storage_key) == data
    assert (upload.size_bytes, upload.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (upload.filename, upload.purpose, upload.expires_after_s) == ("a.jsonl", "fine-tune", None)
    assert left_in(storage) == [upload.file_id]


async def test_a_file_of_many_blocks_is_stored_whole(storage: Storage) -> None:
    data = random.Random(0).randbytes(5 * BLOCK_BYTES + 3)
    parts: list[Part] = [
        ("expires_after[anchor]", b"created_at", None),
        ("expires_after[seconds]", b"3600", None),
        ("file", data, "a"),
        PURPOSE,
    ]
    upload = await receive(CONTENT_TYPE, cut(body_of(*parts), 65536), storage, len(data))
    assert storage.read_bytes(upload.storage_key) == data
    assert upload.expires_after_s == 3600


FILE: Part = ("file", b"{}", "a")
REFUSED: list[tuple[bytes, str | None, str | None]] = [
    (body_of(PURPOSE), "file", "missing_required_parameter"),
    (body_of(FILE), "purpose", "missing_required_parameter"),
    (body_of(PURPOSE, ("file", b"", "a")), "file", "invalid_file"),
    (body_of(FILE, ("purpose", b"party", None)), "purpose", "invalid_value"),
    (body_of(FILE, ("purpose", b"\xff\0", None)), "purpose", "invalid_value"),
    (body_of(FILE, ("purpose", b"a" * 5000, None)), "purpose", "invalid_value"),
    (body_of(FILE, PURPOSE, PURPOSE), "purpose", "invalid_value"),
    (body_of(FILE, FILE, PURPOSE), "file", "invalid_value"),
    (body_of(FILE, PURPOSE, ("colour", b"red", None)), "colour", "unknown_parameter"),
    (body_of(FILE, PURPOSE, ("expires_after[seconds]", b"3600", None)), "expires_after[anchor]", None),
    (body_of(FILE, PURPOSE, ("expires_after[anchor]", b"created_at", None)), "expires_after[seconds]", None),
    (body_of(FILE, PURPOSE, end=b""), None, "invalid_body"),
    (body_of(FILE, PURPOSE)[:-20], None, "invalid_body"),
    (b"", None, "invalid_body"),
    (b"hello", None, "invalid_body"),
    (b"--b0\r\n" + b"x: y\r\n" * 100, None, "invalid_body"),
    (b"--b0\r\nx: " + b"y" * 100_000, None, "invalid_body"),
]


@pytest.mark.parametrize(("body", "param", "code"), REFUSED)
async def test_a_wrong_form_is_refused_and_leaves_nothing(
    storage: Storage, body: bytes, param: str | None, code: str | None
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await receive(CONTENT_TYPE, cut(body, 64), storage, 1 << 20)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert code is None or caught.value.code == code
    assert left_in(storage) == []


@pytest.mark.parametrize(
    ("anchor", "seconds"), [("now", "3600"), ("created_at", "60"), ("created_at", "1e9"), ("created_at", "٣٦٠٠")]
)
async def test_a_wrong_expiry_is_refused(storage: Storage, anchor: str, seconds: str) -> None:
    parts: list[Part] = [
        ("expires_after[anchor]", anchor.encode(), None),
        ("expires_after[seconds]", seconds.encode(), None),
    ]
    with pytest.raises(InvalidRequest) as caught:
        await receive(CONTENT_TYPE, cut(body_of(FILE, PURPOSE, *parts), 64), storage, 1 << 20)
    assert str(caught.value.param).startswith("expires_after[")


@pytest.mark.parametrize(
    "content_type", [None, "", "application/json", "multipart/form-data", "multipart/mixed; boundary=b0"]
)
async def test_another_content_type_is_refused(storage: Storage, content_type: str | None) -> None:
    with pytest.raises(InvalidRequest, match="multipart/form-data"):
        await receive(content_type, cut(body_of(FILE, PURPOSE), 64), storage, 1 << 20)


async def test_the_limit_counts_bytes_of_the_file_and_leaves_nothing(storage: Storage) -> None:
    body = body_of(PURPOSE, ("file", b"x" * 2049, "a"))
    with pytest.raises(TooLarge) as caught:
        await receive(CONTENT_TYPE, cut(body, 100), storage, 2048)
    assert (caught.value.status, caught.value.param) == (413, "file")
    assert left_in(storage) == []
    upload = await receive(CONTENT_TYPE, cut(body_of(PURPOSE, ("file", b"x" * 2048, "a")), 100), storage, 2048)
    assert upload.size_bytes == 2048


async def test_what_follows_the_form_does_not_grow_without_end(storage: Storage) -> None:
    with pytest.raises(TooLarge):
        await receive(CONTENT_TYPE, cut(body_of(FILE, PURPOSE) + b"\r\n" * (2 * BLOCK_BYTES), 65536), storage, 2048)
    assert left_in(storage) == []


async def test_a_refused_body_is_read_to_its_end_so_that_the_client_hears_the_answer(storage: Storage) -> None:
    num_read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_read
        async for chunk in cut(body_of(("colour", b"red", None), ("file", b"x" * (3 * BLOCK_BYTES), "a")), 65536):
            num_read += len(chunk)
            yield chunk

    with pytest.raises(ServiceError):
        await receive(CONTENT_TYPE, body(), storage, 1 << 30)
    assert num_read > 3 * BLOCK_BYTES


class Gone(Exception):
    """The client went away."""


async def test_a_broken_connection_leaves_nothing(storage: Storage) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield body_of(PURPOSE, ("file", b"x" * (2 * BLOCK_BYTES), "a"), end=b"")
        assert storage.list_names(INCOMING) != []
        raise Gone

    with pytest.raises(Gone):
        await receive(CONTENT_TYPE, body(), storage, 1 << 30)
    assert left_in(storage) == []


async def test_a_cancelled_request_leaves_nothing(storage: Storage) -> None:
    written = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield body_of(PURPOSE, ("file", b"x" * (2 * BLOCK_BYTES), "a"), end=b"")
        written.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(receive(CONTENT_TYPE, body(), storage, 1 << 30))
    await written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left_in(storage) == []


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"train.jsonl", "train.jsonl"),
        (b"../../etc/passwd", "passwd"),
        (b"C:\\data\\a.jsonl", "a.jsonl"),
        (b"", "upload"),
        (b"..", "upload"),
        (b"a/", "upload"),
        (b"a\0\r\nb\x7f", "ab"),
        ("ümläut 🚀.jsonl".encode(), "ümläut 🚀.jsonl"),
        (b"\xff.txt", "�.txt"),
        ("a\u202egpj.exe".encode(), "agpj.exe"),
        (b"x" * 999, "x" * 255),
    ],
)
def test_filenames_become_safe(raw: bytes, name: str) -> None:
    assert filenames.clean(raw) == name


def test_a_download_header_is_ascii_and_keeps_the_name() -> None:
    header = filenames.content_disposition('a"b;ü\\.jsonl')
    assert header == "attachment; filename=\"a_b;__.jsonl\"; filename*=UTF-8''a%22b%3B%C3%BC%5C.jsonl"
    assert header.isascii()


async def test_memory_stays_bounded_by_blocks_not_by_the_file(storage: Storage) -> None:
    """The body is produced only as fast as it is written: at most one block is ahead of what storage has."""
    block = b"x" * BLOCK_BYTES
    num_blocks = 8
    ahead = []

    async def body() -> AsyncIterator[bytes]:
        yield b'--b0\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for index in range(num_blocks):
            names = storage.list_names(INCOMING)
            size = storage.fs.size(storage.path(f"{INCOMING}/{names[0]}")) if names else 0
            ahead.append(index * BLOCK_BYTES - size)
            yield block
        yield b"\r\n" + body_of(PURPOSE)

    upload = await receive(CONTENT_TYPE, body(), storage, 1 << 30)
    assert upload.size_bytes == num_blocks * BLOCK_BYTES
    assert max(ahead) <= BLOCK_BYTES + 65536
