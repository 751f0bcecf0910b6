"""What a process and everything that it started use, sampled from /proc while something runs."""

import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

EVERY_S = 0.25
TICK = os.sysconf("SC_CLK_TCK")


class Sample(NamedTuple):
    """One look. Shared pages are counted once: in proportion to who maps them (PSS)."""

    time: float  # unix time
    cpu: float  # seconds, of all processes since the watch began
    driver: int  # bytes of the process itself
    workers: int  # bytes of everything that it started, without the object store
    store: int  # bytes of shared memory that anyone of them has touched: Ray's object store


class Watch:
    """Context manager that samples a process and its descendants.

    Args:
        pid: of the process; by default this one.
        memory: whether to look at memory too, which takes milliseconds a process.
    """

    def __init__(self, pid: int | None = None, memory: bool = True):
        self.pid, self.memory = pid or os.getpid(), memory
        self.samples: list[Sample] = []
        self._before: dict[tuple[int, str], float] = {}
        self._cpu: dict[tuple[int, str], float] = {}
        self._end = threading.Event()

    def __enter__(self) -> "Watch":
        self._before = {(pid, stat[19]): _cpu(stat) for pid, stat in _family(self.pid).items()}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()

    def peak(self, what: str) -> int:
        """The largest sample of `driver`, `workers` or `store`."""
        return max(getattr(sample, what) for sample in self.samples)

    def cpu_at(self, when: float) -> float:
        """CPU seconds used until a time."""
        return next((s.cpu for s in self.samples if s.time >= when), self.samples[-1].cpu)

    def _run(self) -> None:
        while True:
            last = self._end.is_set()
            self.samples.append(self._look())
            if last:
                return
            self._end.wait(EVERY_S)

    def _look(self) -> Sample:
        family = _family(self.pid)
        for pid, stat in family.items():
            start = (pid, stat[19])
            self._cpu[start] = _cpu(stat) - self._before.get(start, 0.0)
        memory = {pid: _memory(pid) for pid in family} if self.memory else {}
        own = memory.get(self.pid, (0, 0))[0]
        private, shared = (sum(column) for column in zip(*memory.values(), strict=True)) if memory else (0, 0)
        return Sample(time.time(), sum(self._cpu.values()), own, private - own, shared)


def _family(pid: int) -> dict[int, list[str]]:
    """The fields of /proc/PID/stat after the name, of a process and its descendants."""
    stats = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                stats[int(place.name)] = (place / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
    found, new = {}, {pid} & set(stats)
    while new:
        found |= {one: stats[one] for one in new}
        new = {one for one, stat in stats.items() if int(stat[1]) in new and one not in found}
    return found


def _cpu(stat: list[str]) -> float:
    return (int(stat[11]) + int(stat[12])) / TICK


def _memory(pid: int) -> tuple[int, int]:
    """Bytes (PSS): without shared memory, and in shared memory."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    of = {name: 1024 * int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return of["Pss"] - of["Pss_Shmem"], of["Pss_Shmem"]
