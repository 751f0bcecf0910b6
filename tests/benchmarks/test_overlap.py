"""What actors on a GPU do beside computing, and how much of it is not overlapped: `embed` for a part, `score` for a shard.

The GPU is a sleep, as long as an H100 takes for ViT-B/32 in bf16, and storage answers late. Everything else is the real thing.
It needs cores of its own: on a machine that others use, only the CPU time means something.

`pytest tests/benchmarks/test_overlap.py -m benchmark -s`
"""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch

from ecif.batching import Shuffled
from pipeline import storage
from pipeline.corpus.pairs import Pair
from pipeline.run_folder import tables
from pipeline.run_folder.artifacts import Artifacts
from pipeline.stages.embed.actor import EmbedPart
from pipeline.stages.embed.forward import Forward
from pipeline.stages.embed.rows import Embedded, Part
from pipeline.stages.embed.usage import THREADS, Meter
from pipeline.stages.score import ScoreShard

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("one_thread")]
PAIRS, PARTS, MODEL_S = 256, 80, 0.018
GPU = THREADS["cuda"]
SHARDS, SHARD_PARTS, SCORE_S = 8, 40, 0.131  # of 10,240 pairs, in ten passes, and agreement with a bank of 16,384


class Asleep(Forward):
    """A model that sleeps."""

    def __init__(self) -> None:
        self.device, self.precision, self._turn, self._copies = torch.device("cpu"), "fp32", threading.Lock(), None
        self.images, self.texts = (torch.randn(PAIRS, width).half() for width in (768, 512))

    def _features(self, pixels, tokens):
        time.sleep(MODEL_S)
        return self.images, self.texts


def part() -> pa.Table:
    pixels = np.zeros((224, 224, 3), np.uint8)
    pairs = [Pair(i, f"{i:09d}", f"{i:032x}", "a caption of some words " * 3, pixels, f"{i:032x}") for i in range(PAIRS)]
    row = Part(0, "00000", 0, 1, pairs, [], False, None, np.zeros((PAIRS, 77), np.int32)).to_row()
    return pa.table({name: [value] for name, value in row.items()})


@pytest.mark.parametrize("late_s", [0.0, 0.03, 0.1])
def test_the_model_hardly_waits(tmp_path, monkeypatch, late_s):
    written = storage.write_bytes

    def late(url, data):
        time.sleep(late_s)
        written(url, data)

    monkeypatch.setattr(storage, "write_bytes", late)
    table, idle, busy = part(), {}, {}
    for threads in (1, GPU):
        actor = EmbedPart.__new__(EmbedPart)
        actor.forward, actor.folders, actor.meter = Asleep(), [str(tmp_path)], Meter(threads)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(actor, [table] * threads))
            parts = PARTS * threads
            started, cpu = time.perf_counter(), time.process_time()
            rows = list(pool.map(actor, [table] * parts))
            took, cpu = time.perf_counter() - started, time.process_time() - cpu
        model = sum(Embedded.from_row({"facts": row["facts"][0]}).busy.model for row in rows)
        idle[threads], busy[threads] = 1e3 * (took - model) / parts, model / took
        print(f"{threads} threads, storage answers after {1e3 * late_s:.0f} ms: ", end="")
        print(f"model busy {busy[threads]:.0%}, {idle[threads]:.1f} ms a part not overlapped, ", end="")
        print(f"{1e3 * cpu / parts:.1f} ms of CPU a part")
    assert busy[GPU] >= 0.9
    assert idle[GPU] <= 10


class AsleepScore(ScoreShard):
    """A GPU that sleeps instead of computing columns."""

    def __init__(self, artifacts: Artifacts, features: str) -> None:
        self.artifacts, self.features, self.batches, self._turn = artifacts, features, Shuffled(256, 0), threading.Lock()
        values = np.random.default_rng(0).standard_normal((14, SHARD_PARTS * PAIRS)).astype(np.float32)
        self.found = {f"column_{i}": column for i, column in enumerate(values)}

    def _compute(self, shard, features, keys):
        time.sleep(SCORE_S)
        return dict.fromkeys(keys, self.found), np.zeros(SHARD_PARTS * PAIRS, np.int16)


@pytest.mark.parametrize("late_s", [0.0, 0.03, 0.1])
def test_score_hardly_waits(tmp_path, monkeypatch, late_s):
    write, read = storage.write_bytes, storage.read_bytes
    draw = np.random.default_rng(0)
    images, texts = (draw.standard_normal((PAIRS, width)).astype(np.float16) for width in (768, 512))
    pairs = [Pair(i, f"{i:09d}", f"{i:032x}", "", np.empty(0, np.uint8), f"{i:032x}") for i in range(PAIRS)]
    part = tables.parquet_bytes(tables.features_table(pairs, images, texts))
    for number in range(SHARD_PARTS):
        write(storage.join(str(tmp_path / "features" / "00000"), tables.part_name(number)), part)

    def late(function):
        def called(*arguments):
            time.sleep(late_s)
            return function(*arguments)

        return called

    monkeypatch.setattr(storage, "write_bytes", late(write))
    monkeypatch.setattr(storage, "read_bytes", late(read))
    keys = ["pairs", "influence/t"]
    actor = AsleepScore(Artifacts(str(tmp_path), dict.fromkeys(keys, "0"), {"00000": "0"}), str(tmp_path / "features"))
    row = {"shard": "00000", "parts": SHARD_PARTS, "keys": json.dumps(keys)}
    for threads in (1, ScoreShard.threads):
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(actor, [row] * threads))
            started = time.perf_counter()
            list(pool.map(actor, [row] * SHARDS * threads))
            busy = SHARDS * threads * SCORE_S / (time.perf_counter() - started)
        print(f"score, {threads} threads, storage answers after {1e3 * late_s:.0f} ms: GPU busy {busy:.0%}")
    assert busy >= 0.8
