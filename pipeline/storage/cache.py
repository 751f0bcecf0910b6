"""Files behind URLs that every process of a node reads: fetched once a node, checked by the hash of their bytes."""

import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.console import say
from pipeline.storage.local import ATTEMPTS, pause
from pipeline.storage.objects import describe, filesystem
from pipeline.urls import HIDDEN, masked


def sha256_of(path: str | Path) -> str:
    """The hash of a local file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, sha256: str | None = None) -> Path:
    """A URL's file in this node's cache. It is fetched if it is not there, by one process of the node.

    Args:
        url: any that fsspec reads. Credentials in it are used, and appear nowhere.
        sha256: what the file has to be. Without it, what the store has now.

    Raises:
        OSError: it can't be fetched, or is another file.
    """
    if HIDDEN in url:
        raise OSError(f"{url}: a run folder keeps no credentials; give the configuration with the whole URL: ecif run CONFIG")
    folder = _folder()
    name = re.sub(r"[^\w.-]", "_", masked(url).removesuffix(f"?{HIDDEN}").rpartition("/")[2]) or "weights"
    key = hashlib.sha256(masked(url).encode()).hexdigest()[:16]
    with _one_at_a_time(folder / f"{key}.lock"):
        known = folder / f"{key}.{_version(url)}" if sha256 is None else None
        if known is not None and known.exists():
            sha256 = known.read_text()
        if sha256 is not None:
            path = folder / sha256 / name
            if path.exists() and sha256_of(path) == sha256:
                return path
        temporary = folder / f"{key}.{os.getpid()}.tmp"
        try:
            say(f"fetching {masked(url)}")
            _download(url, temporary)
            found = sha256_of(temporary)
            if known is None and found != sha256:
                raise OSError(f"{masked(url)}: another file than the driver has (sha256 {found[:12]}, not {str(sha256)[:12]})")
            path = folder / found / name
            path.parent.mkdir(exist_ok=True)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if known is not None and not known.name.endswith("."):
            known.write_text(found)
        return path


def _version(url: str) -> str:
    """What tells whether the store still has the same file; empty if the store does not say, or does not answer."""
    try:
        info = describe(url)
    except Exception:  # noqa: BLE001  (the download that follows says what is wrong)
        return ""
    if info.etag == f"{info.size}-":
        return ""
    return hashlib.sha256(f"{info.size} {info.etag}".encode()).hexdigest()[:16]


def _download(url: str, to: Path) -> None:
    for left in reversed(range(ATTEMPTS)):
        try:
            fs, path = filesystem(url)
            fs.get_file(path, str(to))
            return
        except Exception as error:  # noqa: BLE001  (each store has errors of its own, whose texts may hold credentials)
            final, reason = _reason(error)
            if final or not left:
                raise OSError(f"{masked(url)}: {reason}") from None
            pause(ATTEMPTS - 1 - left)


def _reason(error: Any) -> tuple[bool, str]:
    """Whether another try would end in the same way, and why without the URL."""
    if isinstance(error, FileNotFoundError):
        return True, "there is no such file"
    if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
        return True, "access is refused: the store's own client takes credentials from the environment"
    if isinstance(error, ImportError) or str(error).startswith("Protocol not known"):
        return True, str(error)
    if status := getattr(error, "status", None):
        return status < 500, f"HTTP status {status}"
    if isinstance(error, OSError) and error.errno and error.strerror:
        return False, error.strerror
    return False, type(error).__name__


def _folder() -> Path:
    """The cache of this user on this node: in the home, else in the folder for temporary files."""
    places = [Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()), Path(tempfile.gettempdir())]
    for place, name in zip(places, ("ecif", f"ecif-{os.getuid()}"), strict=True):
        folder = place / name / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise OSError(f"no folder to keep fetched files in: neither {places[0]} nor {places[1]} can be written")


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a process that dies
        yield
