"""Nodes that join late, GPUs that were asked for, and a node where a worker can't start."""

import os
import re
import subprocess
import sys
import time

import pytest

from tests.support.head import ROOT, Head

pytestmark = pytest.mark.slow
POOL = """
import os, sys, time
import ray
from pipeline.console import show_on_terminal
from pipeline.errors import RunError, UserError
from pipeline.workers.cluster import session
from pipeline.workers.shards import as_tasks

class Worker:
    def __init__(self):
        if os.environ.get("WITHOUT_CHECKPOINT"):
            raise OSError("no file /models/clip.pt")

    def __call__(self, row):
        time.sleep(0.5)
        return {"node": ray.get_runtime_context().get_node_id()}

show_on_terminal()
try:
    with session(None, sys.argv[1]) as resources:
        print("GPU" if "num_gpus" in resources.actor else "CPU", resources.workers, flush=True)
        rows = [{"i": i} for i in range(int(sys.argv[2]))]
        done = as_tasks(rows).map(Worker, compute=resources.pool(len(rows)), **resources.actor)
        nodes = set()
        for row in done.iter_rows():
            nodes.add(row["node"])
            if len(nodes) == 2:
                break
        print(len(nodes), "nodes")
except (RunError, UserError) as error:
    print(type(error).__name__, error)
"""


def start(device: str, tasks: int, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", POOL, device, str(tasks)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=os.environ | environment, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)


@pytest.fixture
def head():
    """A head on which nothing computes."""
    with Head("--num-cpus=0") as started:
        yield started


@pytest.fixture
def on_cluster(head):
    return head.environment | {"RAY_ADDRESS": f"127.0.0.1:{head.ports['port']}", "RAY_TMPDIR": str(head.folder)}


def test_gpus_are_waited_for_and_those_that_join_later_are_used(head, on_cluster):
    head.join("--num-cpus=1")  # alone, it would be a cluster of CPUs
    process = start("gpu", 400, **on_cluster)
    try:
        time.sleep(5)
        head.join("--num-cpus=1", "--num-gpus=1")
        assert process.stdout.readline() == "GPU 1\n"
        head.join("--num-cpus=1", "--num-gpus=1")
        out, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert out.splitlines()[-1] == "2 nodes", said
    assert "waiting for resources: no GPU has joined the cluster yet" in said


def test_a_node_where_workers_can_t_start_is_named(head, on_cluster):
    head.join("--num-cpus=1")
    head.join("--num-cpus=1", WITHOUT_CHECKPOINT="yes")
    time.sleep(6)
    process = start("auto", 60, **on_cluster)
    try:
        out, said = process.communicate(timeout=120)
    finally:
        process.kill()
    line = r"RunError the run failed: a worker can't start on node [\d.]+: no file /models/clip\.pt \(.*\)"
    assert re.fullmatch(line, out.splitlines()[-1]), said


def test_no_gpu_will_join_a_machine():
    process = start("gpu", 1, RAY_ADDRESS="", CUDA_VISIBLE_DEVICES="")
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert out == "UserError device: gpu, and Ray finds none on this machine\n"
