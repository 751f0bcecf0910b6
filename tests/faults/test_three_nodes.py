"""A run handed in to a cluster of three nodes that uses an S3 server: nodes join late, and die, and no byte is another."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config import Config
from pipeline.night import night
from pipeline.run_folder.generations import Generations
from tests.support.corpora import EMBEDDED
from tests.support.head import Head
from tests.support.run_folders import result
from tests.support.tars import read_tar, write_tar

pytestmark = pytest.mark.slow
LATE_S = 60
PATIENCE_S = 300


@pytest.fixture
def head(s3):
    """A head that asks for a token, on which nothing computes. Its nodes have the credentials of the server."""
    with Head("--num-cpus=0") as started:
        yield started


def seen(what: Callable[[], object], job: "subprocess.Popen[str]") -> bool:
    """Whether something becomes true while a job goes on."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and job.poll() is None:
        if what():
            return True
        time.sleep(0.2)
    return False


def put(place: str, pairs: Path) -> None:
    """Copy a corpus and its target to a store."""
    for path in pairs.rglob("*.tar"):
        storage.write_bytes(f"{place}/pairs/{path.relative_to(pairs)}", path.read_bytes())


def columns(run: object) -> dict[str, bytes]:
    """The bytes of the last generation, by shard."""
    generations = Generations(str(run))
    return {shard: storage.read_bytes(generations.url(file)) for shard, file in generations.at(None).files.items()}


def test_nodes_join_late_and_die_while_pairs_are_embedded_and_scored(head, s3, configure, pairs, whole):
    place = f"s3://{s3}/three-nodes"
    put(place, pairs)
    submitted(head, configure(f"{place}/run", f"{place}/pairs"))
    assert result(f"{place}/run") == whole


def test_a_night_is_that_of_one_machine(head, s3, configure, pairs, tmp_path, local_ray):
    place, more = f"s3://{s3}/three-nodes-at-night", tmp_path / "pairs"
    shutil.copytree(pairs, more)
    here, there = (
        Config.from_yaml(configure(run, at)) for run, at in ((tmp_path / "run", more), (f"{place}/run", f"{place}/pairs"))
    )
    put(place, more)
    for config in (here, there):
        assert night(config).generation.number == 0
    write_tar(more / "corpus" / "00002.tar", read_tar(EMBEDDED / "corpus" / "00001.tar")[: 3 * 24])
    put(place, more)
    assert night(here).generation.number == 1
    submitted(head, configure(f"{place}/run", f"{place}/pairs"), "--nightly")
    assert columns(f"{place}/run") == columns(tmp_path / "run")


def submitted(head: Head, config: Path, *options: str) -> None:
    """Hand a job in to a head whose nodes join late, and die while it embeds and scores."""
    command = [sys.executable, "-m", "jobs.cli", "submit", str(config), *options, "--address", head.address]
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    outside = {name: value for name, value in head.environment.items() if not name.startswith("AWS_")}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=outside, text=True, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as job:
        time.sleep(LATE_S)
        assert job.poll() is None, job.communicate()
        for _ in range(3):
            head.join("--num-cpus=1")
        for title in ("ray::MapWorker(MapBatches(EmbedPart))", "ray::MapWorker(Map(score))"):
            assert seen(lambda title=title: head.lose(title), job), job.communicate()
            head.join("--num-cpus=1")
        out, said = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, (out, said)
    assert "waiting for resources: no CPU or GPU has joined the cluster yet" in out + said
    assert secret not in out + said
    assert head.token not in out + said
