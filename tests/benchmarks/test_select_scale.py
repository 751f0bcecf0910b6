"""Seconds and memory of `ecif select` on many pairs, as a process of its own, beside the same with all pairs in its memory.

`pytest tests/benchmarks/test_select_scale.py -m benchmark -s`; 40 M pairs take 2 GB of disk. Seconds are those of the machine.
"""

import os
import shutil
import subprocess
import sys
from binascii import hexlify
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.run_folder import tables
from pipeline.run_folder.finished import LATEST, open_run, write_finished
from tests.support.finished import finish

pytestmark = pytest.mark.benchmark
SHARD = 10_000  # pairs
KEEP = 0.3
LIMIT = 2e9  # bytes
PEAK = "\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"  # without what the parent had
SELECT = "from jobs.cli import app; app(standalone_mode=False)"
IN_MEMORY = """
import sys
import jobs.cli, numpy as np
from pipeline.run_folder.finished import open_run
table = open_run(sys.argv[1]).scores(["uid", "clip_score"])
uids, scores = table["uid"].to_pylist(), table["clip_score"].to_numpy()
best = sorted(uids[i] for i in np.argsort(-scores, kind="stable")[: round(float(sys.argv[2]) * len(uids))])
np.save(sys.argv[3], np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in best], "u8,u8"))
"""


class Cost(NamedTuple):
    seconds: float  # of computing, user and system
    peak: int  # largest resident bytes


def run_folder(folder: Path, pairs: int) -> str:
    """A finished run of which only the columns are left. `run.json` says that no uid repeats."""
    finish(folder, "nowhere")
    found = open_run(str(folder))
    write_finished(found._replace(uids=found.uids._replace(pairs=pairs)))
    for i in range(pairs // SHARD):
        random, shard = np.random.default_rng(i), f"{i:05d}"
        digits = pa.py_buffer(hexlify(random.bytes(16 * SHARD)))
        uids = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), SHARD, [None, digits]).cast(pa.binary()).cast(pa.string())
        places = {"shard": pa.array([shard] * SHARD), "index": pa.array(np.arange(SHARD), pa.int32())}
        identity = places | {"key": pa.array([f"{i:05d}{j:04d}" for j in range(SHARD)]), "uid": uids}
        scores = {"clip_score": random.normal(0.25, 0.06, SHARD), "influence_coco": random.normal(0, 1e-6, SHARD)}
        table = tables.described(tables.scores_table(identity, scores), [], "a run", "a shard")
        storage.write_bytes(str(folder / LATEST / f"{shard}.parquet"), tables.parquet_bytes(table))
    return str(folder)


def cost(program: str, *arguments: object) -> Cost:
    process = subprocess.Popen([sys.executable, "-c", program + PEAK, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return Cost(usage.ru_utime + usage.ru_stime, 1024 * int(said.split()[-2]))


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("millions", [2, 10, 40])
def test_memory_does_not_grow_with_the_pairs(folder, millions):
    pairs = millions * 1_000_000
    run, few = run_folder(folder / "run", pairs), run_folder(folder / "few", SHARD)
    condition = ("--where", "influence_coco > 0 and clip_score > 0.2")
    commands = {
        "best 30 % by a column": ("--by", "clip_score", "--keep", KEEP),
        "two columns, then best 30 %": (*condition, "--by", "clip_score", "--keep", KEEP),
    }
    commands["the same, within a subset"] = (*commands["two columns, then best 30 %"], "--within", folder / "s0.npy")
    commands["as a table of keys"] = ("--by", "clip_score", "--keep", KEEP, "--format", "keys")
    empty = cost(SELECT, "select", few, "--out", folder / "few.npy", "--by", "clip_score", "--keep", KEEP)
    print(f"\n{millions} M pairs in {pairs // SHARD} shards (libraries and one shard: {empty.peak / 1e9:.2f} GB)")
    for i, (what, options) in enumerate(commands.items()):
        found = cost(SELECT, "select", run, "--out", folder / f"s{i}.npy", *options)
        say(what, found, empty, pairs)
        assert found.peak < LIMIT
    best = np.load(folder / "s0.npy", mmap_mode="r")
    assert len(best) == round(KEEP * pairs)
    if millions == 2:
        say("all pairs in memory", cost(IN_MEMORY, run, KEEP, folder / "in_memory.npy"), empty, pairs)
        assert (np.load(folder / "in_memory.npy") == best).all()


def say(what: str, found: Cost, empty: Cost, pairs: int) -> None:
    seconds = f"{found.seconds - empty.seconds:6.1f} s of CPU"
    peak = f"peak {found.peak / 1e9:.2f} GB, {(found.peak - empty.peak) / pairs:4.0f} bytes a pair"
    print(f"{what:30} {seconds}, {peak}", flush=True)
