"""What very many shards take the driver. `pytest tests/benchmarks/test_many_shards.py -m benchmark -s`"""

import subprocess
import sys
import time

import pytest

from pipeline.run_folder.dataset import Places
from pipeline.run_folder.tables import Accounting
from pipeline.stages.embed.finish import FEW, Finishers
from pipeline.stages.embed.rows import Embedded
from tests.benchmarks.support.many_shards import ROOT, measure
from tests.benchmarks.support.stand_ins import Asked, run_apart

pytestmark = pytest.mark.benchmark
SHARDS = 100_000
CALL_S = 0.05


def test_100000_shards_are_run_in_little_memory(tmp_path):
    """All stages from embedding to scoring, with stand-ins that read and compute nothing."""
    found = run_apart(Asked(run=str(tmp_path), shards=SHARDS))
    driver, before, resident = (f"{size / 1e6:.0f} MB" for size in (found.peak, found.before, found.resident))
    print(f"\n{SHARDS} shards through all stages in {found.seconds:.0f} s: the driver's own memory peaks at {driver}")
    print(f"({before} before the first stage), with the mapped files of its libraries at {resident}")
    assert found.peak < 1e9


@pytest.mark.parametrize("shards", [41_455, 140_000])
def test_a_finished_run_of_many_shards_is_asked_in_few_requests(tmp_path, shards):
    """LAION-400M and DataComp-1B, 10,000 pairs a shard, with the real code on a local disk."""
    program = [sys.executable, "-m", "tests.benchmarks.support.many_shards", "build", str(tmp_path), str(shards)]
    subprocess.run(program, cwd=ROOT, check=True, capture_output=True)
    print(f"\n{shards} shards: seconds, CPU seconds, peak memory, requests (a listing is one for each 1000 objects)")
    costs = []
    for name in ("import", "sample", "run", "run", "status", "plan"):  # the first run writes the compacted objects
        costs.append(cost := measure(name, tmp_path))
        requests = ", ".join(f"{count} {kind}" for kind, count in sorted(cost.requests.items()))
        print(f"{name:<7} {cost.seconds:6.1f} s {cost.cpu:6.1f} s {cost.peak / 1e6:6.0f} MB   {requests}")
    assert max(cost.seconds for cost in costs) < 120
    assert sum(cost.requests.values()) < 0.02 * shards


def test_a_night_costs_what_is_new(tmp_path):
    """Ten new shards beside few and beside many old ones, with the real code: only the listings grow."""
    costs = {}
    for old in (1_000, 40_000):
        folder = tmp_path / f"{old}"
        program = [sys.executable, "-m", "tests.benchmarks.support.many_shards", "build_night", str(folder), str(old)]
        subprocess.run(program, cwd=ROOT, check=True, capture_output=True)
        costs[old] = cost = measure("night", folder)
        requests = ", ".join(f"{count} {kind}" for kind, count in sorted(cost.requests.items()))
        log = sum(path.stat().st_size for path in (folder / "run" / "table" / "_delta_log").iterdir())
        took = f"{cost.seconds:5.1f} s, {cost.cpu:5.1f} s of the driver, {cost.peak / 1e6:.0f} MB"
        print(f"\n10 shards beside {old:6d}: {took}; {requests}; Delta log {log / 1e6:.1f} MB", flush=True)
    few, many = (sum(cost.requests.values()) for cost in costs.values())
    assert many <= few + 2 * 39  # pages of the listings of 39,000 shards
    assert costs[40_000].peak < 1.3 * costs[1_000].peak


class Slow(Places):
    """Places on a store that takes its time for each of the three calls that a shard without bad pairs takes."""

    def quarantine_url(self, shard: str) -> str:
        time.sleep(CALL_S)
        return super().quarantine_url(shard)

    def parts(self, shard: str) -> list[str]:
        time.sleep(CALL_S)
        return []

    def write_accounting(self, done: Accounting) -> None:
        time.sleep(CALL_S)


@pytest.mark.parametrize("shards", [200, 4_000])
def test_shards_finish_faster_than_one_after_the_other(tmp_path, local_ray, shards):
    """With 50 ms a call, as S3 takes: in the driver's threads, and on workers."""
    places, read = Slow(str(tmp_path), "fingerprint"), Accounting("", 7, "etag", "00", 8, 8, 0, 4, 0, {}, 1, None)
    alone = _rate(Finishers([places], FEW), read, 10, one_by_one=True)
    together = _rate(Finishers([places], shards), read, shards, one_by_one=False)
    where = "threads" if shards <= FEW else "workers"
    print(f"\n{shards} shards finish at {together:.0f} a second in {where}, one after the other at {alone:.1f}")
    assert together > 8 * alone


def _rate(finishers: Finishers, read: Accounting, shards: int, one_by_one: bool) -> float:
    """Shards a second."""
    then = 0.0
    with finishers:
        for i in range(-1, shards):
            finishers.finish(0, read._replace(shard=f"{i}"), [Embedded(0, f"{i}", 7, 4, 0.1, [], None)])
            list(finishers.finished(wait=one_by_one or i < 0))
            then = then or time.perf_counter()  # when the first one is done, because workers have to start
        list(finishers.finished(wait=True))
    return shards / (time.perf_counter() - then)
