"""Whole objects on any fsspec URL. An object that exists is complete."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NamedTuple

from fsspec.core import url_to_fs

guard: ContextVar[Callable[[], None]] = ContextVar("guard", default=lambda: None)  # called before each write; raises to forbid


class Object(NamedTuple):
    """An object as a listing shows it."""

    url: str
    size: int  # bytes
    etag: str  # changes with the content: the store's ETag, or size and modification time of a local file
    modified: float = 0.0  # unix time; 0 if the store does not say


def join(base: str, *parts: str) -> str:
    """A URL below `base`."""
    return "/".join([base.rstrip("/"), *parts])


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, without cached listings, and the path in it."""
    return url_to_fs(url, use_listings_cache=False)


def canonical(url: str) -> str:
    """A URL in the form in which a listing shows it."""
    fs, path = filesystem(url)
    return path.rstrip("/") if is_local(fs) else fs.unstrip_protocol(path).rstrip("/")


def check_guard() -> None:
    """Raise the error of the guard if this thread may no longer write."""
    guard.get()()


def read_bytes(url: str) -> bytes:
    """Read a whole object. Raises FileNotFoundError if there is none."""
    with at(url):
        fs, path = filesystem(url)
        # For reading large objects in pieces, which these are not, s3fs would ask for their sizes first.
        return fs.cat_file(path, **({"max_concurrency": 1} if _speaks(fs, "s3") else {}))


def read_start(url: str, count: int) -> bytes:
    """Read the first `count` bytes of an object, or all of it if it is shorter."""
    return _read_range(url, 0, count)


def read_end(url: str, count: int) -> bytes:
    """Read the last `count` bytes of an object, or all of it if it is shorter."""
    return _read_range(url, -count, None)


def _read_range(url: str, start: int, end: int | None) -> bytes:
    with at(url):
        fs, path = filesystem(url)
        try:
            return fs.cat_file(path, start=start, end=end)
        except OSError:
            if fs.size(path):
                raise
            return b""  # a store refuses any range of an object without bytes


def exists(url: str) -> bool:
    """Whether an object has this name. A prefix is not an object. A store that does not answer raises an error."""
    return described(url) is not None


def write_bytes(url: str, data: bytes) -> None:
    """Write an object so that it appears whole or not at all: rename on local disk, a single PUT on object storage."""
    check_guard()
    with at(url):
        put_bytes(url, data)


def put_bytes(url: str, data: bytes, new: bool = False) -> None:
    """`write_bytes` without a guard.

    Args:
        url: of the object.
        data: all of it.
        new: create the object or fail. Of any number of callers exactly one succeeds. On local disk others may see the object
            before it is whole.

    Raises:
        FileExistsError: `new` is set and the object exists.
    """
    fs, path = filesystem(url)
    if new:
        _create(fs, path, data)
        return
    if not is_local(fs):
        fs.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with _in_place(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _in_place(path: str) -> Iterator[str]:
    """A temporary name beside a local file. If the body succeeds, what it wrote there replaces the file."""
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def delete(url: str) -> None:
    """Remove an object that must not be taken for a complete one."""
    check_guard()
    with at(url):
        fs, path = filesystem(url)
        fs.rm_file(path)


def upload(local: str, url: str) -> None:
    """Move a finished local file to a URL. It appears there whole or not at all."""
    check_guard()
    with at(url):
        fs, path = filesystem(url)
        if is_local(fs):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with _in_place(path) as temporary:
                shutil.move(local, temporary)
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
        else:
            fs.put_file(local, path)
            os.unlink(local)


@contextmanager
def at(url: str) -> Iterator[None]:
    """Turn errors of a store into an OSError that names the object. Each store has errors of its own, and few name it."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, TypeError):  # callers tell these apart
        raise
    except Exception as error:
        kind = PermissionError if isinstance(error, PermissionError) else OSError
        raise kind(f"{url}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def listing(url: str, suffix: str) -> list[Object]:
    """Every object below a folder whose name ends in `suffix`, by name. Empty if there is no such folder."""
    fs, path = filesystem(url)
    try:
        with at(url):
            found = fs.find(path, detail=True)
    except FileNotFoundError:
        return []
    return [_object(fs, info) for name, info in sorted(found.items()) if name.endswith(suffix)]


def children(url: str) -> list[Object]:
    """Every object directly in a folder, in no particular order. Raises FileNotFoundError if there is no such folder."""
    fs, path = filesystem(url)
    with at(url):
        found = fs.ls(path, detail=True)
    return [_object(fs, info) for info in found if info["type"] != "directory"]


def describe(url: str) -> Object:
    """One object as a listing shows it. Raises FileNotFoundError if there is none."""
    fs, path = filesystem(url)
    info = fs.info(path)
    if info["type"] != "file":
        raise FileNotFoundError(url)
    return _object(fs, info)


def described(url: str) -> Object | None:
    """One object as a listing shows it; None if there is none."""
    try:
        with at(url):
            return describe(url)
    except FileNotFoundError:
        return None


def glob(pattern: str) -> list[Object]:
    """Every object whose name matches a pattern with * or ?, by name."""
    fs, path = filesystem(pattern)
    return [_object(fs, info) for _, info in sorted(fs.glob(path, detail=True).items()) if info["type"] != "directory"]


def is_folder(url: str) -> bool:
    """Whether the URL names a folder (a prefix with objects below it) rather than one object."""
    fs, path = filesystem(url)
    return bool(fs.isdir(path))


def _create(fs: Any, path: str, data: bytes) -> None:
    if is_local(fs):  # fsspec's exclusive mode is not exclusive on local files
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "xb") as file:
            try:
                file.write(data)
                file.flush()
            except OSError:  # such as a full disk: the object must not exist then
                os.unlink(path)
                raise
        return
    try:
        fs.pipe_file(path, data, mode="create")
    except OSError as error:  # s3fs has no exception of its own for this answer of most stores
        answer = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if answer in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
            raise FileExistsError(path) from error
        raise


def _object(fs: Any, info: dict[str, Any]) -> Object:
    if info.get("islink"):
        info = fs.info(info["name"])  # a listing of a local folder shows the link, not what it leads to
    etag = info.get("ETag") or info.get("etag") or f"{info['size']}-{info.get('mtime', '')}"
    url = info["name"] if is_local(fs) else fs.unstrip_protocol(info["name"])
    return Object(url, int(info["size"]), str(etag).strip('"'), _modified(info))


def _modified(info: dict[str, Any]) -> float:
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):  # each store has its own name for it
        when = info.get(name)
        if isinstance(when, datetime):
            return when.timestamp()
        if isinstance(when, int | float):
            return float(when)
    return 0.0


def is_local(fs: Any) -> bool:
    """Whether a file system is that of this machine."""
    return _speaks(fs, "file")


def _speaks(fs: Any, protocol: str) -> bool:
    return protocol in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))
