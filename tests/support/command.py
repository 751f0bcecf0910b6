"""`ecif` as a user starts it, and what is left of it when it is killed."""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.support.corpora import SETTINGS

PATIENCE_S = 300
RECONNECT_S = 90  # a Ray worker that is just starting looks for its lost cluster for 60 s

SMALL = {
    "workers": 1,
    "fit": {"folds": 2, "epochs": 2},
    "solve": {"iterations": 4, "refits": 4, "dampings": [0.01, 0.1], "target_batch": 8},
}


def write_config(folder: Path, run: Path | str, pairs: Path | str, model: str, **changes) -> Path:
    """The configuration file of a run."""
    content = {
        "run": str(run),
        "corpus": {"shards": f"{pairs}/corpus"},
        "model": {"name": model},
        "targets": {"clean": {"shards": f"{pairs}/target"}},
    }
    path = folder / f"{uuid.uuid4().hex}.yaml"
    path.write_text(yaml.safe_dump(content | SETTINGS | SMALL | changes))
    return path


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    lines: list[str]  # of standard error

    @property
    def last(self) -> str:
        return self.lines[-1] if self.lines else ""


PROCESSES = multiprocessing.get_context("forkserver")  # imports once for all commands; the session's conftest says what


class Command:
    """The command line in a process and a session of its own."""

    def __init__(self, *arguments: object, environment: dict[str, str] | None = None):
        self.started = time.monotonic()
        self._out, self._err = (tempfile.NamedTemporaryFile("r") for _ in range(2))  # noqa: SIM115
        inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        given = inherited | (environment or {})
        files = (self._out.name, self._err.name)
        self.process = PROCESSES.Process(target=_command_line, args=([*map(str, arguments)], given, *files))
        self.process.start()

    def goes_on(self) -> bool:
        return self.process.is_alive()

    def wait(self) -> Ended:
        self.process.join(PATIENCE_S)
        assert not self.goes_on(), f"the command hangs: {Path(self._err.name).read_text()}"
        lines = Path(self._err.name).read_text().strip().splitlines()
        return Ended(self.process.exitcode, Path(self._out.name).read_text(), lines)

    def wait_until(self, holds: Callable[[], object]) -> bool:
        """Whether it held before the command ended."""
        while self.goes_on():
            if holds():
                return True
            assert time.monotonic() - self.started < PATIENCE_S, "the command hangs"
            time.sleep(0.02)
        return False

    def kill(self) -> bool:
        """SIGKILL to the command's own process, and to no other; whether it was still at work."""
        hit = self.goes_on()
        self.process.kill()
        self.process.join()
        return hit

    def terminate(self) -> None:
        """What schedulers and `kill` send first."""
        os.kill(self.process.pid, signal.SIGTERM)

    def kill_after(self, seconds: float) -> bool:
        """`kill` when it has been at work for so long."""
        self.process.join(max(0.0, self.started + seconds - time.monotonic()))
        return self.kill()

    def processes(self) -> dict[int, str]:
        """Every living process of the command's session, which Ray's are too: its number, what it calls itself."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state not in "ZX":
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return found

    def left_behind(self) -> set[str]:
        """What of a killed command does not end by itself in the time that Ray gives a lost cluster to come back."""
        agents = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # Ray's own: they only watch, and end later still
        end = time.monotonic() + RECONNECT_S
        while (left := set(self.processes().values()) - agents) and time.monotonic() < end:
            time.sleep(0.1)
        return left

    def kill_worker(self, title: str) -> bool:
        """SIGKILL to one of its Ray processes that calls itself so, as soon as there is one; whether there was."""

        def kill() -> bool:
            for process, name in self.processes().items():
                if name.startswith(title):
                    os.kill(process, signal.SIGKILL)
                    return True
            return False

        return self.wait_until(kill)

    def end(self) -> None:
        """Leave nothing behind, whatever happened."""
        self.kill()
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._out.close()
        self._err.close()


def _command_line(arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """What the shell does, and the entry point."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for path, stream in ((os.devnull, 0), (out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_RDWR), stream)
    sys.argv = ["ecif", *arguments]
    from jobs.cli import main

    main()
