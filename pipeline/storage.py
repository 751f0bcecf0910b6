"""Whole objects on any fsspec URL: a name that exists holds a complete object."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from typing import Any, NamedTuple

from fsspec.core import url_to_fs


class Object(NamedTuple):
    """An object as a listing shows it."""

    url: str
    size: int  # bytes
    etag: str  # changes when the content does: the store's ETag, or size and modification time of a local file


def join(base: str, *parts: str) -> str:
    """A URL below `base`."""
    return "/".join([base.rstrip("/"), *parts])


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, without cached listings, and the path in it."""
    return url_to_fs(url, use_listings_cache=False)


def read_bytes(url: str) -> bytes:
    """The whole object; FileNotFoundError if there is none."""
    fs, path = filesystem(url)
    return fs.cat_file(path)


def exists(url: str) -> bool:
    """Whether a complete object has this name. A prefix is not an object."""
    fs, path = filesystem(url)
    return bool(fs.isfile(path))


def write_bytes(url: str, data: bytes) -> None:
    """Write an object so that it appears whole or not at all: rename on local disk, a single PUT on object storage."""
    fs, path = filesystem(url)
    if not _is_local(fs):
        fs.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def delete(url: str) -> None:
    """Remove an object that must not be taken for a complete one."""
    fs, path = filesystem(url)
    fs.rm_file(path)


def upload(local: str, url: str) -> None:
    """Put a finished local file under its name, whole; it is gone from where it was."""
    fs, path = filesystem(url)
    if _is_local(fs):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        shutil.move(local, temporary)
        os.replace(temporary, path)
    else:
        fs.put_file(local, path)
        os.unlink(local)


@contextmanager
def local_copy(source: Object) -> Iterator[BufferedReader]:
    """The object as a seekable local file, all of it or an error.

    Raises:
        OSError: fewer or more bytes arrived than the listing announced.
    """
    fs, path = filesystem(source.url)
    with tempfile.TemporaryDirectory(prefix="ecif-") as scratch:
        if not _is_local(fs):
            fs.get_file(path, os.path.join(scratch, "object"))
            path = os.path.join(scratch, "object")
        if os.path.getsize(path) != source.size:
            raise OSError(f"{source.url}: read {os.path.getsize(path)} bytes of {source.size}")
        with open(path, "rb") as file:
            yield file


def listing(url: str, suffix: str) -> list[Object]:
    """Every object below a folder whose name ends in `suffix`, by name; an empty list where there is no such folder."""
    fs, path = filesystem(url)
    try:
        found = fs.find(path, detail=True)
    except FileNotFoundError:
        return []
    return [_object(fs, info) for name, info in sorted(found.items()) if name.endswith(suffix)]


def describe(url: str) -> Object:
    """Size and etag of one object; FileNotFoundError if there is none."""
    fs, path = filesystem(url)
    info = fs.info(path)
    if info["type"] != "file":
        raise FileNotFoundError(url)
    return _object(fs, info)


def glob(pattern: str) -> list[Object]:
    """Every object whose name matches a pattern with * or ?, by name."""
    fs, path = filesystem(pattern)
    return [_object(fs, info) for _, info in sorted(fs.glob(path, detail=True).items()) if info["type"] != "directory"]


def is_folder(url: str) -> bool:
    """Whether the URL names a folder (a prefix with objects below it) rather than one object."""
    fs, path = filesystem(url)
    return bool(fs.isdir(path))


def _object(fs: Any, info: dict[str, Any]) -> Object:
    if info.get("islink"):
        info = fs.info(info["name"])  # a listing of a local folder shows the link, not what it leads to
    etag = info.get("ETag") or info.get("etag") or f"{info['size']}-{info.get('mtime', '')}"
    url = info["name"] if _is_local(fs) else fs.unstrip_protocol(info["name"])
    return Object(url, int(info["size"]), str(etag).strip('"'))


def _is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))
