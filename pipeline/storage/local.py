"""An object as a local file, for readers that seek."""

import io
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from pipeline.storage.objects import Object, at, describe, filesystem, is_local

BUFFER = 1 << 17  # bytes of one read of a local file; it holds many headers of small members
ATTEMPTS = 4  # to read an object
PAUSE_S = 1.0  # seconds before the second attempt, doubled before each further one


def pause(attempt: int) -> None:
    """Wait after a failed attempt to read. The first attempt is 0."""
    time.sleep(PAUSE_S * 2**attempt)


@contextmanager
def local_copy(source: Object, attempts: int = 1) -> Iterator[BinaryIO]:
    """The object as a seekable local file, whole and unchanged since it was listed.

    A local file is read in place. `expect_unchanged` afterwards says whether it changed while it was read.

    Args:
        source: the object as it was listed.
        attempts: number of tries to fetch it from another store, with pauses between them.

    Raises:
        OSError: it can't be fetched, has changed since it was listed, or ends before its size, also while it is read.
    """
    fs, path = filesystem(source.url)
    with tempfile.TemporaryDirectory(prefix="ecif-") as scratch:
        if not is_local(fs):
            remote, path = path, os.path.join(scratch, "object")
            for left in reversed(range(attempts)):
                try:
                    _fetch(fs, remote, path, source)
                    break
                except OSError:
                    if not left:
                        raise
                    pause(attempts - 1 - left)
        expect_unchanged(source)
        with io.BufferedReader(_CompleteFile(path, source.size), BUFFER) as file:
            yield file  # type: ignore[misc]  # typeshed: no BinaryIO, because its write is another


def _fetch(fs: Any, remote: str, path: str, source: Object) -> None:
    with at(source.url):
        fs.get_file(remote, path)
    if os.path.getsize(path) != source.size:
        raise OSError(f"{source.url}: read {os.path.getsize(path)} bytes of {source.size}")


def expect_unchanged(source: Object) -> None:
    """Raise OSError if size or etag differ from the listing."""
    with at(source.url):
        now = describe(source.url)
    if (now.size, now.etag) != (source.size, source.etag):
        raise OSError(f"{source.url}: has changed since it was listed ({source.size} bytes then, {now.size} now)")


class _CompleteFile(io.RawIOBase):
    """A file of a known size. A read that ends before that size raises OSError, so that no reader takes it for the end."""

    def __init__(self, path: str, size: int):
        self._file, self._size = open(path, "rb", buffering=0), size  # noqa: SIM115

    @property
    def name(self) -> str:
        """Its local path, for a reader that needs a position of its own."""
        return self._file.name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._read(buffer)
        if not count and len(buffer) and self._file.tell() < self._size:
            raise OSError(f"{self._file.name}: read {self._file.tell()} bytes of {self._size}")
        return count

    def _read(self, buffer: Any) -> int:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()
