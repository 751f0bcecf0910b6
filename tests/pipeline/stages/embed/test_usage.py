"""What models wait for is told apart: readers that are slow, and storage that is."""

import pytest

from pipeline.stages.embed import usage
from pipeline.stages.embed.rows import Busy, Embedded
from pipeline.stages.embed.usage import Meter, Usage

THREADS = 3


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(usage.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_a_part_that_comes_after_the_model_is_free_was_waited_for(clock):
    meter = Meter(THREADS)
    with meter.visit(3.0) as first:
        assert meter.busy(first, 1.0, 1.0) == Busy(1.0, 0.0, 0.0, 3.0), "before its first part a model waits for nothing"
    clock.now = 5.0
    with meter.visit(0.0) as second:
        assert meter.busy(second, 1.0, 6.0) == Busy(1.0, readers=4.0)
        clock.now = 5.5
        with meter.visit(0.0) as third:  # it came while the model worked
            assert meter.busy(third, 1.0, 7.0) == Busy(1.0)


def test_a_part_that_comes_when_a_thread_has_written_waited_for_storage(clock):
    meter = Meter(THREADS)
    visits = [meter.visit(0.0) for _ in range(THREADS)]
    for ended, visit in enumerate(visits, 1):
        meter.busy(visit.__enter__(), 1.0, float(ended))
    clock.now = 10.0
    visits[0].__exit__(None, None, None)
    with meter.visit(0.0) as visit:
        assert meter.busy(visit, 1.0, 11.0) == Busy(1.0, storage=10.0 - THREADS)


def embedded(pairs: int, *busy: float) -> Embedded:
    return Embedded(0, "00000", 1, pairs, Busy(*busy), [], None)


def test_shares_are_said_and_readers_that_are_too_few(clock):
    found = Usage(gpus=True)
    assert found.lines() == []
    found.add(embedded(1000, 93.0, 4.0, 3.0, 10.0))
    assert found.lines() == ["GPUs busy 93%, waiting for readers 4%, for storage 3%"]
    found.add(embedded(3000, 7.0, 293.0, 0.0, 790.0))
    busy, warning = found.lines()
    assert busy == "GPUs busy 25%, waiting for readers 74%, for storage 1%"
    assert warning.startswith("readers are the limit: 5 pairs/s a reader, 40 a GPU; 8 readers, a CPU core each, keep one busy")
    short = Usage(gpus=False)
    short.add(embedded(10, 1.0, 3.0, 0.0, 4.0))
    assert short.lines() == ["models busy 25%, waiting for readers 75%, for storage 0%"], "seconds are no reason to warn"
