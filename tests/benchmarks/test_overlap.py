"""What an actor of `embed` does beside the model, and how much of it is not overlapped.

The model sleeps as long as ViT-B/32 takes for a part of 256 on an H100 in bf16, and storage answers late. Everything else is
the real thing. It needs cores of its own: on a machine that others use, only the CPU time means something.

`pytest tests/benchmarks/test_overlap.py -m benchmark -s`
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline import storage
from pipeline.corpus.pairs import Pair
from pipeline.stages.embed.actor import EmbedPart
from pipeline.stages.embed.forward import Forward
from pipeline.stages.embed.rows import Embedded, Part
from pipeline.stages.embed.usage import THREADS, Meter

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("one_thread")]
PAIRS, PARTS, MODEL_S = 256, 60, 0.018


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


@pytest.mark.parametrize("late_s", [0.0, 0.03])
def test_the_model_hardly_waits(tmp_path, monkeypatch, late_s):
    written = storage.write_bytes

    def late(url, data):
        time.sleep(late_s)
        written(url, data)

    monkeypatch.setattr(storage, "write_bytes", late)
    table, idle, busy = part(), {}, {}
    for threads in (1, THREADS):
        actor = EmbedPart.__new__(EmbedPart)
        actor.forward, actor.folders, actor.meter = Asleep(), [str(tmp_path)], Meter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(actor, [table] * THREADS))
            started, cpu = time.perf_counter(), time.process_time()
            rows = list(pool.map(actor, [table] * PARTS))
            took, cpu = time.perf_counter() - started, time.process_time() - cpu
        model = sum(Embedded.from_row({"facts": row["facts"][0]}).busy.model for row in rows)
        idle[threads], busy[threads] = 1e3 * (took - model) / PARTS, model / took
        print(f"{threads} threads, storage answers after {1e3 * late_s:.0f} ms: ", end="")
        print(f"model busy {busy[threads]:.0%}, {idle[threads]:.1f} ms a part not overlapped, ", end="")
        print(f"{1e3 * cpu / PARTS:.1f} ms of CPU a part")
    assert busy[THREADS] >= 0.9
    assert idle[THREADS] <= 10
