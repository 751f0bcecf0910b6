"""Processes and machines that are lost in the middle of a run do not end it, and change no byte."""

import shutil
import tempfile

import pytest

from pipeline import storage
from tests.support.run_folders import result

pytestmark = pytest.mark.slow
POOLS = [f"ray::MapWorker({does})" for does in ("MapBatches(EmbedPart)", "Map(score)")]
ACTORS = [POOLS[0], "ray::_fit", "ray::_Slices", POOLS[1], "ray::publish"]  # in the order of the stages


def test_a_process_of_every_stage_is_killed(ecif, configure, tmp_path, pairs, whole):
    command = ecif("run", configure(tmp_path / "run", pairs, workers=2))
    for title in ACTORS:
        assert command.kill_worker(title), (title, command.wait())
    ended = command.wait()
    assert ended.code == 0, ended
    assert "a worker process was lost: others take its share of the sample" in ended.lines
    assert result(tmp_path / "run") == whole


def test_a_process_that_is_killed_again_and_again_ends_the_run_with_one_line(ecif, configure, tmp_path, pairs):
    long = {"folds": 2, "epochs": 5000}  # nobody waits for its end
    command = ecif("run", configure(tmp_path / "run", pairs, fit=long))
    while command.kill_worker("ray::_fit"):
        pass
    ended = command.wait()
    assert (ended.code, ended.out) == (1, "")
    assert ended.last.startswith("ecif: the run failed: Ray gave up: WorkerCrashedError")
    assert ended.last.endswith("(what is written is whole; the same command resumes)")
    assert "Traceback" not in "\n".join(ended.lines)


@pytest.fixture
def cluster(monkeypatch):
    """A head without a CPU for work, and two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-")  # a short name: sockets have a limit
    monkeypatch.setenv("RAY_TMPDIR", folder)  # nobody else finds this cluster
    started = Cluster()
    try:
        for cpus in (0, 1, 1):
            started.add_node(num_cpus=cpus)
        yield started
    finally:
        started.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("stage", ["features", "heads"])  # while pairs are embedded, while systems are solved
def test_a_node_is_lost_and_another_is_left(ecif, configure, cluster, tmp_path, pairs, whole, stage):
    run = tmp_path / "run"
    command = ecif("run", configure(run, pairs, workers=2), RAY_ADDRESS=cluster.address)
    assert command.wait_until(lambda: storage.listing(str(run / stage), "")), command.wait()
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    assert command.goes_on()
    ended = command.wait()
    assert ended.code == 0, ended
    assert result(run) == whole
