"""A run handed in to a cluster of three nodes that uses an S3 server: nodes join late, and die, and no byte is another."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from pipeline import storage
from tests.support.head import Head
from tests.support.run_folders import result

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


def test_nodes_join_late_and_die_while_pairs_are_embedded_and_scored(head, s3, configure, pairs, whole):
    place = f"s3://{s3}/three-nodes"
    for path in pairs.rglob("*.tar"):
        storage.write_bytes(f"{place}/pairs/{path.relative_to(pairs)}", path.read_bytes())
    config = configure(f"{place}/run", f"{place}/pairs")
    command = [sys.executable, "-m", "jobs.cli", "submit", str(config), "--address", head.address]
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
    assert result(f"{place}/run") == whole
