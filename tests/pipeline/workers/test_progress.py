"""Progress in a log: the time, a rate in the stage's unit, and a time left that waits until it is known."""

import logging
import re

import pytest

from pipeline import console
from pipeline.workers import progress
from pipeline.workers.progress import Stage


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines_of(clock, unit, amounts, step=10.0):
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    console.log.addHandler(handler)
    try:
        with Stage("score", 1000, 0, unit) as stage:
            clock[0] += 100  # workers start
            for amount in amounts:
                clock[0] += step
                stage.advance(amount)
    finally:
        console.log.removeHandler(handler)
    return said


def test_a_rate_and_the_time_left_are_said_once_they_are_known(clock):
    said = lines_of(clock, "pairs", [100, 50, 50, 50, 50])
    assert said[:3] == ["score     10%", "score     15%", "score     20%"]
    # 150 pairs in the 30 s since the first were done, which came in one burst after the start; 750 are left.
    assert said[3] == "score     25%, 5 pairs/s, 2 min left"
    assert said[4] == "score     30%, 5 pairs/s, 2 min left"
    assert said[-1] == "score    done in 150.0 s"


def test_bytes_and_stages_without_a_unit(clock):
    assert lines_of(clock, "bytes", [1] * 5)[4].startswith("score      0%, 0 bytes/s, ")
    assert lines_of(clock, None, [10] * 5)[4] == "score      5%, 16 min left"


def test_durations():
    assert [progress.duration(s) for s in (7, 99.4, 150, 5900, 86400)] == ["7 s", "99 s", "2 min", "98 min", "24.0 h"]


def test_lines_about_progress_carry_the_time_without_a_terminal(capfd):
    console.show_on_terminal()
    with Stage("test", 1):
        pass
    console.say("a line of another kind")
    timed, plain = capfd.readouterr().err.strip().splitlines()[-2:]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d test     done in \d+\.\d s", timed)
    assert plain == "a line of another kind"


def test_a_stage_that_waits_for_resources_says_what_for(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "IDLE_S", 0.2)
    monkeypatch.setattr(progress, "say_at", said.append)
    answers = iter([None, "1 x GPU: 1", "1 x GPU: 1"])
    monkeypatch.setattr(progress, "unmet", lambda: next(answers, None))
    with Stage("score", 1) as stage:
        end = progress.time.monotonic() + 5
        while not said and progress.time.monotonic() < end:
            progress.time.sleep(0.02)
        stage.advance(1)
    assert said[0] == "score    waiting for resources: no node has room for 1 x GPU: 1; nothing done for 0 s"
