"""A real S3 server that can be killed, and started again on the same ports and folder."""

import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import s3fs

BUCKET = "test"


class S3Server:
    """SeaweedFS with one bucket; what it holds is in the folder."""

    def __init__(self, folder: Path):
        self.folder, self.ports = folder, [_free_port() for _ in range(5)]
        self.credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": uuid.uuid4().hex}
        self.process: subprocess.Popen | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to know."""
        endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports[0]}", "AWS_DEFAULT_REGION": "us-east-1"}
        return self.credentials | endpoint

    def client(self) -> s3fs.S3FileSystem:
        """A client of its own, which keeps neither listings nor connections of an earlier server."""
        secret = {"key": self.credentials["AWS_ACCESS_KEY_ID"], "secret": self.credentials["AWS_SECRET_ACCESS_KEY"]}
        endpoint = {"endpoint_url": self.environment["AWS_ENDPOINT_URL"]}
        return s3fs.S3FileSystem(**secret, client_kwargs=endpoint, use_listings_cache=False, skip_instance_cache=True)

    def start(self) -> None:
        """Return when objects can be written and read."""
        names = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
        flags = [f"-{name}={port}" for name, port in zip(names, self.ports, strict=True)]
        quiet = ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        bucket = [f"-bucket={BUCKET}", "-s3.autoCreateBucket=false"]
        self.process = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("weed")), "mini",
                f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *flags, *quiet, *bucket,
            ],
            env=os.environ | self.credentials,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for _ in range(200):
            try:
                self.client().pipe_file(f"{BUCKET}/ready", b"")
            except OSError:
                assert self.process.poll() is None, "the S3 server ended"
                time.sleep(0.3)
            else:
                return
        raise AssertionError("the S3 server did not come up")

    def kill(self) -> None:
        """As a machine that loses power."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


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
