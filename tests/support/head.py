"""The head of a real Ray cluster with its job server and a token, as `ray start --head` in this environment starts it."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Self

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
PATIENCE_S = 180
TRIES = 3


class Head:
    """A head on this machine's loopback, in a session and a folder of its own: a context, within which its job server answers.

    Args:
        flags: more flags of `ray start`.
    """

    def __init__(self, *flags: str):
        self.token = secrets.token_hex(16)  # Ray's ports are open to the machine's network, whatever the address
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a short name: sockets have a limit
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port", "ray-client-server-port")
        self.ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self.address = f"http://127.0.0.1:{self.ports['dashboard-port']}"
        where = [f"--{name}={port}" for name, port in self.ports.items()]
        loopback = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={self.folder}"]
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._start("--head", *where, *loopback, *flags)

    def __enter__(self) -> Self:
        try:
            self.wait()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def join(self, *flags: str, **environment: str) -> None:
        """Start one more node, whose workers have a further environment. Ray gives up after 30 s, early on a busy machine."""
        for _ in range(TRIES):
            (port,) = _free_ports(1)
            where = [f"--address=127.0.0.1:{self.ports['port']}", f"--dashboard-agent-listen-port={port}"]
            log = self._start(*where, "--node-ip-address=127.0.0.1", *flags, **environment)
            while self._nodes[-1].poll() is None:
                if "Ray runtime started" in log.read_text():
                    return
                time.sleep(0.2)
        raise AssertionError(f"no node could join: {log.read_text()}")

    def _start(self, *flags: str, **environment: str) -> Path:
        name = f"node-{len(self._nodes)}"
        log = self.folder / f"{name}.log"
        with log.open("w") as file:
            node = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *flags],
                env=self.environment | environment | {"NODE": name},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._nodes.append(node)
        return log

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that belongs to the cluster. A home without a token of its own, and this checkout's packages."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        path = f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        usual = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        usual |= {"RAY_metrics_report_interval_ms": "500"}
        return inherited | auth | usual | {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(self.folder)}

    def wait(self) -> None:
        """Return when the job server answers."""
        asked = urllib.request.Request(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"})
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            assert self._nodes[0].poll() is None, (self.folder / "node-0.log").read_text()
            with suppress(OSError), urllib.request.urlopen(asked, timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.3)
        raise AssertionError(f"no job server at {self.address}: {(self.folder / 'node-0.log').read_text()}")

    def metrics(self) -> str:
        """What Prometheus would read of the head."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['metrics-export-port']}/metrics", timeout=30) as answer:
            return answer.read().decode()

    def lose(self, title: str) -> bool:
        """End a node that has a process of this title, as if the machine lost its power; whether there is one."""
        process = next((p for p in self._processes() if _read(p, "cmdline").startswith(title.encode())), None)
        variables = [] if process is None else _read(process, "environ").split(b"\0")
        node = next((variable for variable in variables if variable.startswith(b"NODE=")), None)
        if node is None:
            return False
        _kill(self._processes(node))
        return True

    def end(self) -> None:
        """End every process of the cluster, whatever happened, and delete its folder."""
        for node in self._nodes:
            node.send_signal(signal.SIGTERM)
        for node in self._nodes:
            with suppress(subprocess.TimeoutExpired):
                node.wait(10)
        _kill(self._processes())
        for node in self._nodes:
            node.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _processes(self, variable: bytes = b"") -> list[int]:
        """Living processes that were started with this cluster's folder as their home, among them those of its jobs.

        With a variable, only those that have it in their environment: a node's.
        """
        wanted = (f"HOME={self.folder}\0".encode(), variable + b"\0")
        every = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
        return [p for p in every if p != os.getpid() and all(part in _read(p, "environ") for part in wanted)]


def _read(process: int, what: str) -> bytes:
    """A file of /proc; empty for a process that has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/{what}").read_bytes()
    return b""


def _kill(processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
