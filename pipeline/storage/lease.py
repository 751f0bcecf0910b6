"""One run at a time in a run folder: a lease on its storage, with a fencing token.

The lease is the object `<run>/lease/<token>.json` with the greatest token. A run that creates the object of the next token
holds the folder. Creation is exclusive (a conditional PUT on S3, O_EXCL on local disk), so of any number of runs exactly one
gets it. The holder rewrites its object `BEATS` times in `ttl` seconds.

A run that finds an object that nobody released watches it. If the object changes, the run is refused. If it does not change for
`ttl` seconds of the watcher's own clock, the run takes the next token. So clocks need not agree. If the holder was a process of
this machine that has ended, the run takes over at once. The last object stays, marked as released, because tokens only grow.

Guarantee: every write of the driver first checks that the lease was renewed less than `ttl / 2` ago. If it was not, the run has
to create the next token, and that fails if anybody else has held the folder since. So a run that was stopped, cut off or slow
for any length of time writes nothing after another has taken over. The exception is a write that was sent before and took more
than `ttl / 2` to land. Tasks on workers that write tables do not check. They end with their driver, and names and bytes of what
they write are functions of the configuration and the shard, the same from any run. Tasks that finish a shard look at the lease
first (`Holder`), because they also remove what an earlier content of the shard left.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.console import say
from pipeline.errors import RunError, UserError

TTL_S = 60.0  # seconds after which a run that crashed or could not renew may lose its folder
BEATS = 12  # renewals in `ttl` seconds; a second run is refused as soon as it sees one


class _Seen(NamedTuple):
    """The lease as a run finds it."""

    token: int  # 0: nobody has ever held the folder
    data: bytes  # of the object; every renewal changes them
    facts: dict[str, Any]  # its parsed content; empty while it is being written

    def is_free(self) -> bool:
        """Whether it was released, or its holder was a process of this machine that has ended."""
        if self.token == 0 or self.facts.get("released"):
            return True
        here = bool(_machine()) and self.facts.get("machine") == _machine()
        return here and self.facts["started"] != _started(self.facts["pid"])


class Holder(NamedTuple):
    """The run that holds a folder, for tasks on workers that have to write for nobody else."""

    folder: str
    id: str

    def check(self) -> None:
        """Raise RunError if another run has taken over the folder, or if the run has ended."""
        facts = _look(self.folder).facts
        if facts.get("id") != self.id or facts.get("released"):
            raise RunError(f"another run has taken over {self.folder}: this one did not renew its lease")


held: ContextVar[Holder | None] = ContextVar("held", default=None)  # by this thread; None if it holds no folder


class Lease:
    """A run folder that this process holds. `hold_folder` makes it.

    Args:
        folder: of the run.
        token: greater than every token before.
        holder: facts about this process that the object holds.
        renewed: start of the last successful renewal, in seconds of `_clock`.
    """

    def __init__(self, folder: str, token: int, holder: dict[str, Any], renewed: float):
        self.folder, self.token, self.ttl, self.id = folder, token, float(holder["ttl"]), holder["id"]
        self._holder, self._renewed, self._beat, self._lost = holder, renewed, 0, False
        self._lock, self._released = threading.Lock(), threading.Event()

    def check(self) -> None:
        """Return if this run still holds the folder.

        Raises:
            RunError: another run has taken over, or the lease can't be renewed.
        """
        if not self._lost and not self._is_stale():
            return
        try:
            with self._lock:
                self._renew()
        except Exception as error:  # noqa: BLE001  (each store has errors of its own)
            raise RunError(f"the lease on {self.folder} can't be renewed: {_line(error)}; the same command resumes") from None
        if self._lost:
            raise RunError(f"another run has taken over {self.folder}: this one did not renew its lease for {self.ttl:g} s")

    def keep(self) -> None:
        """Renew until released. This is the body of a thread."""
        while not self._released.wait(self.ttl / BEATS):
            with self._lock, suppress(Exception):  # the next beat tries again; `check` raises if it is too late
                self._renew()

    def release(self) -> None:
        """Let the next run have the folder at once."""
        self._released.set()
        with self._lock, suppress(Exception):  # a lease that can't be released expires
            if not self._lost:
                self._write(released=True)

    def _is_stale(self) -> bool:
        return _clock() - self._renewed >= self.ttl / 2

    def _renew(self) -> None:
        if self._lost or self._released.is_set():
            return
        started = _clock()
        if self._is_stale():  # only the next token can tell whether another run has held the folder since
            self._lost = not _create(self.folder, self.token + 1, self._holder)
            self.token += not self._lost
            self._renewed = started
            return
        self._beat += 1
        self._write()
        self._lost = _tokens(self.folder)[-1:] != [self.token]
        if not self._is_stale():  # else the write may have landed too late
            self._renewed = started

    def _write(self, **facts: bool) -> None:
        storage.put_bytes(_url(self.folder, self.token), _bytes(self._holder | {"beat": self._beat} | facts))


@contextmanager
def hold_folder(folder: str, ttl: float = TTL_S) -> Iterator[Lease]:
    """Hold a run folder. In the body, every write of this thread first checks that the run still holds it.

    Args:
        folder: of the run, path or URL.
        ttl: seconds without a renewal after which another run may take over.

    Raises:
        UserError: another run holds it, or nothing can be written there.
        RunError: in the body, when another run has taken over.
    """
    try:
        lease = _acquire(folder, ttl)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  (each store has errors of its own)
        raise UserError(f"run: can't write to {folder}: {_line(error)}") from None
    threading.Thread(target=lease.keep, name="lease", daemon=True).start()
    before, nobody = storage.guard.set(lease.check), held.set(Holder(folder, lease.id))
    try:
        yield lease
    finally:
        storage.guard.reset(before)
        held.reset(nobody)
        lease.release()


def _acquire(folder: str, ttl: float) -> Lease:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "started": _started(os.getpid())}
    holder |= {"id": uuid.uuid4().hex, "ttl": ttl}
    while True:
        seen = _look(folder)
        if seen.is_free() or _is_abandoned(folder, seen, ttl):
            started = _clock()
            if _create(folder, seen.token + 1, holder):
                for earlier in _tokens(folder)[:-1]:
                    with suppress(FileNotFoundError):
                        storage.delete(_url(folder, earlier))
                return Lease(folder, seen.token + 1, holder, started)


def _look(folder: str) -> _Seen:
    while tokens := _tokens(folder):
        with suppress(FileNotFoundError):  # a newer one has replaced it
            data = storage.read_bytes(_url(folder, tokens[-1]))
            try:
                return _Seen(tokens[-1], data, json.loads(data))
            except ValueError:
                return _Seen(tokens[-1], data, {})
    return _Seen(0, b"", {})


def _is_abandoned(folder: str, seen: _Seen, ttl: float) -> bool:
    """Watch a lease. True if it does not change while it is valid; False if it is released or replaced meanwhile.

    Raises:
        UserError: it was renewed.
    """
    ttl = seen.facts.get("ttl", ttl)
    who = f"process {seen.facts.get('pid', '?')} on {seen.facts.get('host', '?')}"
    say(f"another run held {folder} ({who}): waiting up to {ttl:.0f} s to see whether it lives")
    since = time.monotonic()
    while True:
        time.sleep(ttl / BEATS / 4)
        at = time.monotonic()
        now = _look(folder)
        if now.token != seen.token or now.is_free():
            return False
        if now.data != seen.data:
            raise UserError(f"run: another run is at work in {folder} ({who}): wait until it ends, or use another run folder")
        if at - since >= ttl:
            return True


def _create(folder: str, token: int, holder: dict[str, Any]) -> bool:
    """Try to create the object of a token. False if another run has it, or has had a later one."""
    url, data = _url(folder, token), _bytes(holder)
    with suppress(FileExistsError):
        storage.put_bytes(url, data, new=True)
    with suppress(FileNotFoundError):
        # Compare bytes: a PUT that was repeated because its answer got lost finds its own object there.
        return storage.read_bytes(url) == data and _tokens(folder)[-1] == token
    return False


def _tokens(folder: str) -> list[int]:
    names = [item.url.rsplit("/", 1)[-1] for item in storage.listing(storage.join(folder, "lease"), ".json")]
    return sorted(int(name.removesuffix(".json")) for name in names)


def _url(folder: str, token: int) -> str:
    return storage.join(folder, "lease", f"{token:08d}.json")


def _bytes(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts, indent=1) + "\n").encode()


def _machine() -> str:
    """Id of this boot and its process namespace, within which process numbers are unique. Empty if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int:
    """Start time of a process in ticks, which tells it from a later process of the same number. 0 if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(fields[18])


def _clock() -> float:
    """Seconds, including those that the machine slept: a lease grows old in its sleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME if sys.platform == "linux" else time.CLOCK_MONOTONIC)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
