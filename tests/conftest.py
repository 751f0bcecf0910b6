"""A small open_clip model on disk, one local Ray for the session, a real S3 server."""

import multiprocessing
import os

import pytest

from tests.support.s3_server import BUCKET, S3Server
from tests.support.small_models import TINY, write_model

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes with spinning threads crawl on few cores
os.environ.setdefault("RAY_worker_niceness", "0")  # or a busy machine leaves them nothing
os.environ.setdefault("RAY_num_workers_soft_limit", "8")  # processes that have imported everything serve the next run too
os.environ.setdefault("HF_HUB_OFFLINE", "1")
multiprocessing.set_forkserver_preload(["pytest", "s3fs", "jobs.cli", "pipeline.run"])  # other processes import this once


@pytest.fixture(scope="session", autouse=True)
def said_on_the_terminal():
    """What is said is seen, as by someone at the command line."""
    from pipeline.console import show_on_terminal

    show_on_terminal()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), TINY)


@pytest.fixture(scope="session")
def local_ray(s3):
    """Ray on this machine for the session; runs started meanwhile use it. Its workers inherit the S3 server's credentials."""
    from pipeline.workers.cluster import session

    with session(None) as resources:
        yield resources


@pytest.fixture(scope="session")
def s3(tmp_path_factory) -> str:
    """A real S3 server for the session; gives the name of a bucket in it."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    before = {key: os.environ.get(key) for key in server.environment}
    os.environ.update(server.environment)
    try:
        server.start()
        yield BUCKET
    finally:
        server.kill()
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
