"""A small open_clip model on disk, one local Ray for the session, a real S3 server."""

import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import s3fs
from small_models import TINY, write_model

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes with spinning threads crawl on few cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), TINY)


@pytest.fixture(scope="session")
def local_ray(s3):
    """Ray on this machine for the session; runs started meanwhile use it. Its workers inherit the S3 server's credentials."""
    from pipeline.cluster import session

    with session(None) as resources:
        yield resources


@pytest.fixture(scope="session")
def s3(tmp_path_factory) -> str:
    """A real S3 server for the session; gives the name of a bucket in it."""
    ports = [_free_port() for _ in range(5)]
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": uuid.uuid4().hex}
    names = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
    flags = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    quiet = ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-bucket=test"]
    place = [f"-dir={tmp_path_factory.mktemp('s3')}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("weed")), "mini", *place, *flags, *quiet],
        env=os.environ | credentials,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    environment = credentials | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[0]}", "AWS_DEFAULT_REGION": "us-east-1"}
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    try:
        _wait_for(server)
        yield "test"
    finally:
        server.kill()
        server.wait()
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _free_port() -> int:
    """A port that is free, and whose gRPC twin 10000 above is too."""
    while True:
        with socket.socket() as one, socket.socket() as twin:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port + 10000 > 65535:
                continue
            try:
                twin.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            return port


def _wait_for(server: subprocess.Popen) -> None:
    for _ in range(100):
        try:
            s3fs.S3FileSystem(skip_instance_cache=True).pipe_file("test/ready", b"")
        except OSError:
            assert server.poll() is None, "the S3 server ended"
            time.sleep(0.3)
        else:
            return
    raise AssertionError("the S3 server did not come up")
