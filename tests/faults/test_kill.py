"""A run that is killed, at any moment and any number of times, ends with the same bytes as one that never was."""

import json
import random
import shutil
import uuid

import pytest

from pipeline import storage
from tests.support.run_folders import result

slow = pytest.mark.slow


@pytest.fixture(params=["local", pytest.param("s3", marks=slow)])
def place(request, tmp_path, pairs):
    """Where a run and its corpus are."""
    if request.param == "local":
        return str(tmp_path), str(pairs)
    base = f"s3://{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    for path in pairs.rglob("*.tar"):
        storage.write_bytes(f"{base}/pairs/{path.relative_to(pairs)}", path.read_bytes())
    return base, f"{base}/pairs"


def finish(ecif, config, run) -> dict[str, bytes]:
    """The same command until it ends, and what is there then."""
    ended = ecif("run", config).wait()
    assert ended.code == 0, ended
    assert not [line for line in ended.lines if "waiting" in line], "a killed run is seen to be gone"
    return result(run)


EMBEDDING, SOLVING, SCORING = "features", "heads", "pairs"  # what is written first while they go on


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param([SOLVING], id="while systems are solved"),
        pytest.param([EMBEDDING, SOLVING, SCORING], id="in three stages", marks=slow),
    ],
)
def test_killed_and_resumed_each_time(ecif, configure, place, whole, stages):
    base, pairs = place
    config, run = configure(f"{base}/run", pairs), f"{base}/run"
    for stage in stages:
        command = ecif("run", config)
        there = command.wait_until(lambda folder=f"{run}/{stage}": storage.listing(folder, ""))
        assert there, f"ended before it was killed in {stage}: {command.wait()}"
        assert len(command.processes()) > 5
        assert command.kill()
    assert finish(ecif, config, run) == whole
    assert not command.left_behind(), "what a killed command started ends too"


def test_told_to_stop_it_ends_in_order(ecif, configure, tmp_path, pairs):
    run = tmp_path / "run"
    command = ecif("run", configure(run, pairs))
    assert command.wait_until(lambda: storage.listing(f"{run}/{EMBEDDING}", ""))
    command.terminate()
    ended = command.wait()
    assert ended.code == 1
    assert "told to stop" in ended.last, ended
    assert not [line for line in ended.lines if "SIGTERM" in line or "Traceback" in line], "one line, no traces"
    assert not command.left_behind()
    (lease,) = storage.listing(f"{run}/lease", ".json")
    assert json.loads(storage.read_bytes(lease.url))["released"], "another machine need not wait for it"


@slow
def test_20_kills_at_random_moments(ecif, configure, tmp_path, pairs, whole, duration):
    draw, hit = random.Random(0), 0
    for i in range(20):
        run = tmp_path / f"run{i}"
        config = configure(run, pairs)
        hit += ecif("run", config).kill_after((i + draw.random()) / 20 * duration)
        assert finish(ecif, config, run) == whole, f"kill {i}"
        shutil.rmtree(run)
    assert hit >= 15


@slow
def test_kills_at_random_moments_one_after_the_other(ecif, configure, place, whole, duration):
    base, pairs = place
    config, run, draw, hit = configure(f"{base}/run", pairs), f"{base}/run", random.Random(1), 0
    for _ in range(8):
        hit += ecif("run", config).kill_after(draw.uniform(0.1, 0.5) * duration)
    assert hit >= 4
    assert finish(ecif, config, run) == whole
