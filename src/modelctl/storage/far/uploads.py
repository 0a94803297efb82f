"""How a file comes to a store: in parts, from start to end; it appears when it is committed.

Three kinds. S3 takes parts in any order and at once, and puts them together when it is told to.
Google's and Azure's stores take them one after the other, and an object appears when its last one
is closed. Others get a file of another name, which is renamed.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import Any

# The bytes of a part, and how many parts are on their way at once while they are so small.
PART, _AT_ONCE = 8 << 20, 4
_IN_FLIGHT = PART * _AT_ONCE
# S3 puts together so many; Azure five times as many.
_MOST_PARTS = 10_000
# Less is kept until the end, and sent in one request.
_SMALL = 64 << 10
_MIB = 1 << 20


def part_size(nbytes: int) -> int:
    """The bytes of a part of a file of so many, which no more than 10,000 parts make."""
    least = -(-nbytes // _MOST_PARTS)
    return max(PART, -(-least // _MIB) * _MIB)


class Upload(ABC):
    """A file on its way. Only :meth:`commit` shows anything of it."""

    at_once = 1

    def __init__(self, fs: Any, path: str, nbytes: int) -> None:
        self._fs, self._path = fs, path
        self._size = part_size(nbytes)
        self._part = bytearray()
        self._sent = 0
        self._jobs: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(
            max(1, min(self.at_once, _IN_FLIGHT // self._size)), "modelctl-upload"
        )

    def put(self, data: memoryview) -> None:
        """What comes next. Raises what sending an earlier part raised."""
        while data:
            room = self._size - len(self._part)
            self._part += data[:room]
            data = data[room:]
            if len(self._part) == self._size:
                self._next()

    def finish(self) -> None:
        """All was put: wait until it is there, as far as it goes before it is committed."""
        if self._part:
            self._next()
        while self._jobs:
            self._jobs.popleft().result()
        self._pool.shutdown()
        self._close()

    def stop(self) -> None:
        """End what is on its way: a part that comes after its upload was given up would stay."""
        self._pool.shutdown(cancel_futures=True)

    def _next(self) -> None:
        part, self._part = self._part, bytearray()
        while len(self._jobs) >= self._pool._max_workers:
            self._jobs.popleft().result()
        self._sent += 1
        self._jobs.append(self._pool.submit(self._send, self._sent, part))

    @abstractmethod
    def _send(self, number: int, part: bytearray) -> None:
        """Send a part, the first of which is 1."""

    def _close(self) -> None:  # noqa: B027
        """What there is to do after the last part."""

    @abstractmethod
    def commit(self) -> None:
        """Let it stand under its name."""

    @abstractmethod
    def discard(self) -> None:
        """Take back all that was sent, once nothing is on its way."""


class S3Upload(Upload):
    """To a store that speaks S3's multipart uploads. s3fs's own files send one part after the
    other, so its calls are made here."""

    at_once = _AT_ONCE

    def __init__(self, fs: Any, path: str, nbytes: int) -> None:
        super().__init__(fs, path, nbytes)
        bucket, key, *_ = fs.split_path(path)
        self._where = {"Bucket": bucket, "Key": key}
        self._whole: bytes | None = None if nbytes > _SMALL else b""
        self._begun = Lock()
        self._upload: dict[str, str] = {}
        self._parts: dict[int, dict[str, Any]] = {}

    def _send(self, number: int, part: bytearray) -> None:
        if self._whole is not None:
            self._whole = bytes(part)
            return
        with self._begun:
            if not self._upload:
                made = self._fs.call_s3("create_multipart_upload", **self._where)
                self._upload = {**self._where, "UploadId": made["UploadId"]}
        # a copy would be held for each part that is on its way
        said = self._fs.call_s3("upload_part", **self._upload, PartNumber=number, Body=part)
        sums = {key: text for key, text in said.items() if key.startswith("Checksum")}
        sums.pop("ChecksumType", None)
        self._parts[number] = {"PartNumber": number, "ETag": said["ETag"], **sums}

    def commit(self) -> None:
        if self._whole is not None:
            self._fs.call_s3("put_object", **self._where, Body=self._whole)
        else:
            parts = [self._parts[number] for number in sorted(self._parts)]
            self._fs.call_s3(
                "complete_multipart_upload", **self._upload, MultipartUpload={"Parts": parts}
            )
        self._upload = {}
        self._fs.invalidate_cache(self._path)

    def discard(self) -> None:
        upload, self._upload = self._upload, {}
        if upload:
            self._fs.call_s3("abort_multipart_upload", **upload)


class ClosedUpload(Upload):
    """To a store where an object appears when its last part is closed."""

    def __init__(self, fs: Any, path: str, nbytes: int) -> None:
        super().__init__(fs, path, nbytes)
        self._file: Any = None

    def _send(self, number: int, part: bytearray) -> None:
        if self._file is None:
            self._file = self._fs.open(self._path, "wb", block_size=self._size)
        # what reaches this is sent at once: nothing waits in memory until it is closed
        self._file.blocksize = len(part)
        self._file.write(part)

    def commit(self) -> None:
        if self._file is None:  # an empty file
            self._file = self._fs.open(self._path, "wb", block_size=self._size)
        self._file.close()
        self._file = None
        self._fs.invalidate_cache(self._path)

    def discard(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.discard()
            finally:
                file.closed = True  # or the collector would close it, and it would appear


class RenamedUpload(Upload):
    """To a file system that has files: written under another name beside it."""

    def __init__(self, fs: Any, path: str, nbytes: int, move: Callable[[str, str], object]) -> None:
        super().__init__(fs, path, nbytes)
        folder, _, name = path.rpartition("/")
        self._folder, self._move = folder, move
        self._temp = f"{folder}/.{name[-100:]}.modelctl-{secrets.token_hex(4)}.tmp"
        self._file: Any = None

    def _open(self) -> Any:
        if self._file is None:
            self._fs.makedirs(self._folder, exist_ok=True)
            self._file = self._fs.open(self._temp, "wb")
        return self._file

    def _send(self, number: int, part: bytearray) -> None:
        self._open().write(part)

    def _close(self) -> None:
        self._open().close()

    def commit(self) -> None:
        self._move(self._temp, self._path)
        self._file = None

    def discard(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(Exception):
                file.close()
            self._fs.rm_file(self._temp)
