"""A run that is small enough to be killed often, and what it leaves when nothing happens to it."""

import time
from collections import Counter
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.run import run
from tests.support.command import Command, write_config
from tests.support.corpora import EMBEDDED
from tests.support.run_folders import result
from tests.support.tars import read_tar, write_tar


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """2 shards of 24 pairs, and a target of 12."""
    folder = tmp_path_factory.mktemp("pairs")
    members = read_tar(EMBEDDED / "corpus" / "00000.tar")
    for shard in range(2):
        write_tar(folder / "corpus" / f"{shard:05d}.tar", members[72 * shard : 72 * (shard + 1)])
    write_tar(folder / "target" / "00000.tar", read_tar(EMBEDDED / "target" / "00000.tar")[: 3 * 12])
    return folder


@pytest.fixture
def configure(tmp_path, tiny_model):
    """`write_config`, with the folder and the model filled in."""
    return lambda run, pairs, **changes: write_config(tmp_path, run, pairs, tiny_model, **changes)


@pytest.fixture
def ecif():
    """Starts commands."""
    started = []

    def start(*arguments, **environment) -> Command:
        started.append(Command(*arguments, environment=environment))
        return started[-1]

    yield start
    for command in started:
        command.end()


@pytest.fixture(scope="session")
def whole(tmp_path_factory, local_ray, pairs, tiny_model) -> dict[str, bytes]:
    """The result of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    run(Config.from_yaml(write_config(folder, folder / "run", pairs, tiny_model)))
    found = result(folder / "run")
    kinds = Counter(name.partition("/")[0] for name in found)
    assert kinds >= Counter(features=6, shards=2, heads=1, directions=1, pairs=2, influence=2, latest=2, targets=3)
    return found


@pytest.fixture(scope="session")
def duration(tmp_path_factory, pairs, tiny_model) -> float:
    """Seconds that the command takes when nothing happens to it."""
    folder = tmp_path_factory.mktemp("duration")
    command = Command("run", write_config(folder, folder / "run", pairs, tiny_model))
    try:
        assert command.wait().code == 0
        return time.monotonic() - command.started
    finally:
        command.end()
